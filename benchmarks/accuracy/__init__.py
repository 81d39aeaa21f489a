"""Does GLoRA help? Fine-tuning on real texts, at equal numbers of parameters: `python -m benchmarks.accuracy`."""
