"""The default model from nothing but its parts: one command, which goes on where it was stopped.

    python paddlemix/examples/llava/demo_recipe/run.py --output_dir demo_recipe_out

    data      drawn scenes and easy-VQA, as the JSON files of stages 2 and 3 and of the tests
    tower     stage 1: the vision tower learns to see objects (pretrain_tower.py)
    table     two more layers of it write them down, a word a patch (write_table.py)
    base      SmolLM2, the tower and a first projector become a model's folder (fit_projector.py)
    align     stage 2: the projector, on captions with boxes (supervised_finetune.py, stage2_align.json)
    instruct  stage 3: LoRA on the decoder, and the projector, on chats (…, stage3_instruct.json)
    sides     stage 4: the same adapter goes on, on which side one object is of another (…, stage4_sides.json)
    relations stage 5: on yes and no to the same, one word of an axis more often (…, stage5_relations.json)
    balance   stage 6: on the words alike (…, stage6_balance.json)
    rest      stage 7: on the rest of the questions once more (…, stage7_rest.json)
    export    the tower, the projector and the adapter in fp16, as the package ships them
    evaluate  the model made of these: tools/evaluate.py on the tests, and on easy-VQA with blank pictures

A step that is done leaves a file in ``done/``; to do it again, remove that and the step's folder. The last checkpoint of a
step that was killed is taken up.
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

if __package__ in (None, ""):  # run by its path, from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from paddlemix.errors import UserError
from paddlemix.tools.command_line import exit_status

logger = logging.getLogger("paddlemix.demo_recipe")

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parents[2] / "tools"
STEPS = tuple("data tower table base align instruct sides relations balance rest export evaluate".split())


class Recipe:
    """The steps, each a method; they hand each other files in ``output_dir``."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.out = Path(os.path.expanduser(arguments.output_dir)).absolute()

    def run(self) -> None:
        """Does the steps that are not done yet, in order, up to ``--until``."""
        (self.out / "done").mkdir(parents=True, exist_ok=True)
        for name in STEPS[: STEPS.index(self.arguments.until) + 1]:
            marker = self.out / "done" / f"{name}.json"
            if marker.is_file():
                logger.info("%s is done already", name)
                continue
            logger.info("%s begins", name)
            began = time.time()
            step: Callable[[], Optional[Dict[str, Any]]] = getattr(self, name)
            figures = step() or {}
            marker.write_text(json.dumps({"minutes": round((time.time() - began) / 60, 1), **figures}, indent=1))

    def data(self) -> None:
        from paddlemix.examples.llava.demo_recipe.data import write_data
        from paddlemix.examples.llava.demo_recipe.easy_vqa_data import find_easy_vqa

        a = self.arguments
        easy = find_easy_vqa(a.easy_vqa)
        counts = a.align_rows, a.instruct_scenes, a.instruct_easy_vqa
        write_data(self.out / "data", easy, *counts, a.chinese_share, a.seed)

    def tower(self) -> Dict[str, Any]:
        from paddlemix.examples.llava.demo_recipe.pretrain_tower import pretrain
        from paddlemix.models.llava.demo import DEMO_VISION

        a = self.arguments
        below = {**DEMO_VISION, "num_hidden_layers": DEMO_VISION["num_hidden_layers"] - 2}
        return pretrain(str(self.out / "tower"), below, steps=a.tower_steps, seed=a.seed, easy_vqa=a.easy_vqa)

    def table(self) -> Dict[str, Any]:
        from paddlemix.examples.llava.demo_recipe.write_table import write_table
        from paddlemix.models.llava.demo import DEMO_VISION

        a, below = self.arguments, self.out / "tower" / "tower.safetensors"
        options = dict(steps=a.table_steps, seed=a.seed, easy_vqa=a.easy_vqa)
        return write_table(str(self.out / "table"), DEMO_VISION, below, **options)

    def base(self) -> Dict[str, Any]:
        from safetensors.numpy import load_file, save_file

        from paddlemix import LlavaLlamaForCausalLM, LlavaProcessor
        from paddlemix.examples.llava.demo_recipe.data import write_rows
        from paddlemix.examples.llava.demo_recipe.easy_vqa_data import find_easy_vqa
        from paddlemix.examples.llava.demo_recipe.fit_projector import fit_projector, note_embeddings, word_embeddings
        from paddlemix.examples.llava.demo_recipe.language import text_rows
        from paddlemix.examples.llava.demo_recipe.pretrain_tower import EasyVQAPictures
        from paddlemix.models.llava.demo import build, find_smollm2
        from paddlemix.processors.tokenizer import encode_text

        folder, scratch = self.out / "base", self.out / "base.partial"
        for old in (folder, scratch):
            shutil.rmtree(old, ignore_errors=True)
        build(scratch, find_smollm2(), [])  # tower and projector at random
        model = LlavaLlamaForCausalLM.from_pretrained(scratch)
        processor = LlavaProcessor.from_pretrained(scratch)
        model.set_state_dict(load_file(str(self.out / "table" / "tower.safetensors")))
        encode = partial(encode_text, processor.tokenizer)
        embeddings = model.llama.embed_tokens.weight.numpy()
        words, notes = word_embeddings(embeddings, encode), note_embeddings(embeddings, encode)
        easy = EasyVQAPictures(find_easy_vqa(self.arguments.easy_vqa))
        steps = self.arguments.projector_steps
        llama = model.llama
        nearest = fit_projector(llama.vision_tower, llama.mm_projector, words, notes, easy, steps)
        logger.info("%.3f of the patches lie nearest to their own word", nearest)
        shutil.rmtree(scratch)
        parts = []
        for name in ("vision_tower", "mm_projector"):
            tensors = {key: value.numpy() for key, value in model.state_dict().items() if f"llama.{name}." in key}
            parts.append(self.out / f"base_{name}.safetensors")
            save_file(tensors, str(parts[-1]))
        build(scratch, find_smollm2(), parts)
        text = self.out / "data" / "text.json"
        if not text.is_file():  # the decoder's own answers don't depend on the tower
            write_rows(text, text_rows(model, processor))
        scratch.rename(folder)
        return {"nearest": nearest}

    def align(self) -> None:
        self._finetune("stage2", "stage2_align.json", self.out / "base", ["align.json"])

    def instruct(self) -> None:
        data = ["instruct.json", "text.json", "text.json"]
        self._finetune("stage3", "stage3_instruct.json", self.out / "stage2", data)

    def sides(self) -> None:
        self._go_on("sides", "stage4", "stage3", self.arguments.side_scenes, self.arguments.later_easy_vqa)

    def relations(self) -> None:
        self._go_on("relations", "stage5", "stage4", self.arguments.relation_scenes, self.arguments.later_easy_vqa)

    def balance(self) -> None:
        self._go_on("balance", "stage6", "stage5", self.arguments.balance_scenes, self.arguments.later_easy_vqa)

    def rest(self) -> None:
        self._go_on("rest", "stage7", "stage6", self.arguments.rest_scenes, self.arguments.rest_easy_vqa)

    def _go_on(self, plan: str, stage: str, before: str, scenes: int, easy: int) -> None:
        """Writes the chats of a later stage and trains the adapter of the stage before on them."""
        from paddlemix.examples.llava.demo_recipe.data import write_chats
        from paddlemix.examples.llava.demo_recipe.easy_vqa_data import find_easy_vqa

        a, folder = self.arguments, self.out / "data"
        text = json.loads((folder / "text.json").read_text(encoding="utf-8"))
        write_chats(folder, plan, scenes, find_easy_vqa(a.easy_vqa), easy, text, a.seed)
        self._finetune(stage, f"{stage}_{plan}.json", self.out / "stage2", [f"{plan}.json"], self.out / before)

    def _finetune(self, name: str, shipped: str, model: Path, data: List[str], adapter: Optional[Path] = None) -> None:
        """Runs the fine-tuning tool on the shipped JSON, with this run's folders in it."""
        from paddlemix.models.llava.onednn import multiplies_in_bfloat16

        config = json.loads((HERE / shipped).read_text(encoding="utf-8"))
        config["model_name_or_path"] = str(model)
        config["output_dir"] = str(self.out / name)
        config["bf16"] = multiplies_in_bfloat16()
        if adapter is not None:
            config["lora_path"] = str(adapter)
        for entry, file in zip(config["dataset"]["train"], data):
            entry["data_files"] = str(self.out / "data" / file)
        path = self.out / f"{name}.json"
        path.write_text(json.dumps(config, indent=4), encoding="utf-8")
        self._call([sys.executable, str(TOOLS / "supervised_finetune.py"), str(path)])

    def export(self) -> None:
        from paddlemix.examples.llava.demo_recipe.export import export

        export(self.out / "stage7", self.out / "weights")
        # what was made of earlier weights says nothing about these
        shutil.rmtree(self.out / "model", ignore_errors=True)
        for figures in self.out.glob("*.figures.json"):
            figures.unlink()

    def evaluate(self) -> Dict[str, Any]:
        """The tests, greedy, asked of the model as it is shipped; easy-VQA also with blank pictures."""
        from paddlemix.models.llava.demo import build, find_smollm2

        model = self.out / "model"
        if not model.is_dir():
            aside = self.out / "model.partial"
            shutil.rmtree(aside, ignore_errors=True)
            build(aside, find_smollm2(), sorted((self.out / "weights").rglob("*.safetensors")))
            aside.rename(model)
        tests = [("scenes_test", False), ("easy_vqa_test", False), ("easy_vqa_test", True)]
        tests += [("scenes_test_zh", False)] if self.arguments.chinese_share else []
        return {f"{test}{'_blank' if blank else ''}": self._evaluate(model, test, blank) for test, blank in tests}

    def _evaluate(self, model: Path, test: str, blank: bool) -> Dict[str, Any]:
        """Figures of one test, from its file if an earlier call has written it."""
        from paddlemix.tools import evaluate

        name = f"{test}{'_blank' if blank else ''}"
        done = self.out / f"{name}.figures.json"
        if done.is_file():
            return json.loads(done.read_text())
        command = ["--model_name_or_path", str(model), "--data_file", str(self.out / "data" / f"{test}.json")]
        command += ["--output_file", str(self.out / f"{name}.predictions.jsonl"), "--batch_size", "64"]
        command += ["--blank_image"] if blank else []
        command += ["--limit", str(self.arguments.eval_limit)] if self.arguments.eval_limit else []
        logger.info("%s", name)
        figures = evaluate.run(evaluate.parse(command))
        done.write_text(json.dumps(figures, indent=1))
        return figures

    @staticmethod
    def _call(command: List[str]) -> None:
        logger.info("%s", " ".join(command))
        status = subprocess.run(command, check=False).returncode
        if status:
            raise UserError(f"{Path(command[1]).name} ended with status {status}; its message is above.")


def parse(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="demo_recipe_out")
    parser.add_argument("--until", choices=STEPS, default=STEPS[-1], help="the last step to do")
    parser.add_argument("--easy_vqa", help="easy-VQA's data folder [the installed package's]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tower_steps", type=int, default=3000, help="steps of 32 pictures")
    parser.add_argument("--table_steps", type=int, default=2600, help="steps of 64 pictures")
    parser.add_argument("--projector_steps", type=int, default=400)
    parser.add_argument("--align_rows", type=int, default=100, help="rows of stage 2")
    parser.add_argument("--instruct_scenes", type=int, default=520, help="chats of stage 3 about scenes")
    parser.add_argument("--instruct_easy_vqa", type=int, default=240, help="chats of stage 3 about easy-VQA")
    parser.add_argument("--chinese_share", type=float, default=0.0, help="of stage 3's chats about scenes")
    parser.add_argument("--side_scenes", type=int, default=1000, help="chats of stage 4 about scenes")
    parser.add_argument("--relation_scenes", type=int, default=2000, help="chats of stage 5 about scenes")
    parser.add_argument("--balance_scenes", type=int, default=900, help="chats of stage 6 about scenes")
    parser.add_argument("--rest_scenes", type=int, default=600, help="chats of stage 7 about scenes")
    parser.add_argument("--later_easy_vqa", type=int, default=50, help="chats of each of stages 4 to 6 about easy-VQA")
    parser.add_argument("--rest_easy_vqa", type=int, default=20, help="chats of stage 7 about easy-VQA")
    parser.add_argument("--eval_limit", type=int, help="rows of each test [all]")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    from paddlemix.runtime import prepare_cpu

    prepare_cpu()

    def work() -> int:
        Recipe(arguments).run()
        return 0

    return exit_status(work, "stopped; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
