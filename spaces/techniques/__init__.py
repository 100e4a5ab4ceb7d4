"""What may be done to a network, as plain frozen data: recipes, spaces, structures. Nothing here touches a weight,
imports torch, or draws a random choice."""
