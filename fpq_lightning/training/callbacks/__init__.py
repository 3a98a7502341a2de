"""Lightning callbacks: checkpoints, progress, finalising weights, judging images, reports."""
