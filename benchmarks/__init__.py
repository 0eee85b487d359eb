"""Comparison of batchjob with what people use today: the same images, model, batches and columns, run in turn."""
