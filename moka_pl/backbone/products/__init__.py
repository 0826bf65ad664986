"""How frozen layers multiply on a GPU."""
