"""batchjob beside what people use today: same images, model, batch and columns, measured in turn."""
