"""The composition root: puts data, methods, training, evaluation and report together. Its modules are the library's entry points:
`run.train`, `run.evaluate`, `run.model.load`, and `run.data` for the data commands."""
