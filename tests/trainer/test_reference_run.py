"""Twenty steps beside transformers' Trainer and PEFT (tests/fixtures/make_training_golden.py): the same losses."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from paddlemix.models.llava.constants import IMAGE_TOKEN_INDEX
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM
from paddlemix.trainer.adapters import add_lora
from paddlemix.trainer.arguments import FinetuneArguments
from paddlemix.trainer.callbacks import read_log
from paddlemix.trainer.freezing import select_trained
from paddlemix.trainer.trainer import LlavaTrainer
from tests.support import FIXTURES
from tests.trainer.tiny import Samples

sys.path.insert(0, str(FIXTURES))
import training_reference as reference  # noqa: E402

sys.path.pop(0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The tiny model as Hugging Face's folder."""
    folder = tmp_path_factory.mktemp("tiny-hf")
    save_file(reference.weights(), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "vision_config": {"model_type": "clip_vision_model", **reference.VISION},
        "text_config": {"model_type": "llama", **reference.TEXT},
        "image_token_index": reference.IMAGE_ID,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rows():
    for row in reference.rows():
        ids = [IMAGE_TOKEN_INDEX if index == reference.IMAGE_ID else index for index in row["input_ids"]]
        yield {**row, "input_ids": ids, "image_sizes": [(8, 8)] if row["pixel_values"] is not None else []}


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_losses_equal_those_of_transformers(checkpoint, tmp_path, mode):
    model = LlavaLlamaForCausalLM.from_pretrained(checkpoint, dtype="float32")
    if mode == "lora":
        model = add_lora(model, rank=reference.RANK, alpha=reference.ALPHA, dropout=0.0)
        for name, layer in model.model.named_sublayers():
            if hasattr(layer, "lora_A"):
                values = reference.lora_a(name.split("llama.")[1], layer.lora_A.shape[0])
                layer.lora_A.set_value(values.T)
    select_trained(model, lora=mode == "lora")
    args = FinetuneArguments(
        output_dir=str(tmp_path),
        device="cpu",
        per_device_train_batch_size=reference.BATCH,
        gradient_accumulation_steps=reference.ACCUMULATION,
        max_steps=reference.STEPS,
        learning_rate=reference.RATE,
        weight_decay=reference.DECAY,
        adam_beta1=reference.BETA1,
        adam_beta2=reference.BETA2,
        adam_epsilon=reference.EPSILON,
        max_grad_norm=reference.MAX_NORM,
        warmup_steps=reference.WARMUP,
        lr_scheduler_type="cosine",
        seed=reference.SEED,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    LlavaTrainer(model, args, Samples(list(rows()))).train()
    losses = [entry["loss"] for entry in read_log(tmp_path / "train_log.jsonl")]
    golden = json.loads((FIXTURES / "training_golden.json").read_text())[mode]
    assert len(losses) == reference.STEPS
    np.testing.assert_allclose(losses, golden, rtol=1e-3)
