"""Classes that go by a checkpoint's ``model_type``: configuration, model, processor, tokenizer."""

from paddlemix.auto.classes import AutoConfigMIX, AutoModelMIX, AutoProcessorMIX, AutoTokenizerMIX

__all__ = ["AutoConfigMIX", "AutoModelMIX", "AutoProcessorMIX", "AutoTokenizerMIX"]
