"""Lightning callbacks: checkpoints, progress, the quantized pipeline, image quality and reports."""
