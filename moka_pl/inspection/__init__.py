"""What is in an adapter directory: numbers of its layers, a page of pictures, two adapters compared."""
