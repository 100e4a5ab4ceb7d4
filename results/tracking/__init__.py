"""A study in MLflow. The study's journal stays the source of truth: nothing is read back to continue a search.

With `results/registered_model.py`, whose copy MLflow runs, this is the only place that imports MLflow.

- `database`: the SQLite file of a local store, and the file lock under which it is created.
- `store`: tracking URIs, which run belongs to a study, and writing runs with retries and explained errors.
- `charts`: texts, tables and the saved chart view of MLflow's pages.
- `tracker`: one parent run per study and one child run per candidate.
- `registry`: a version of a registered model.
- `server`: MLflow's UI as a child process.
"""
