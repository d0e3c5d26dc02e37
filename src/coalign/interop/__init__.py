"""Models in the formats of other libraries: load and export."""
