"""MLflow as a mirror of a study; with what `register` ships, the only place that imports MLflow. The journal stays the truth, and
nothing is read back from here to continue a search."""
