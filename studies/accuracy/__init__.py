"""Does GLoRA help? Fine-tuning at equal numbers of parameters, on real data: `python -m studies.accuracy`."""
