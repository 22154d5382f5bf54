"""Output folders: what may be begun, what is gone on with, and checkpoints that are whole or don't count."""

import json
import os
import shutil

import pytest

from paddlemix.errors import UserError
from paddlemix.trainer.run_folder import (
    MARKER,
    begin_run,
    find_checkpoint,
    finish_run,
    is_whole,
    plan_run,
    publish,
    remove_old_checkpoints,
    seal,
    write_aside,
    write_json,
)


def checkpoint(folder, step, content=b"weights" * 1000):
    partial = folder / f".partial-checkpoint-{step}"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(content)
    (partial / "config.json").write_text("{}")
    seal(partial)
    publish(partial, folder / f"checkpoint-{step}")
    return folder / f"checkpoint-{step}"


def settings(folder, **changes):
    return {"output_dir": str(folder / "out"), "learning_rate": 1e-3, **changes}


def run(folder, *, steps=(), finished=False, **changes):
    given = settings(folder, **changes)
    begin_run(folder / "out", given, plan_run(given))
    for step in steps:
        checkpoint(folder / "out", step)
    if finished:
        (folder / "out" / "model.safetensors").write_bytes(b"weights")
        finish_run(folder / "out")
    return given


def test_an_empty_or_missing_folder_begins(tmp_path):
    assert plan_run(settings(tmp_path)).action == "start"
    (tmp_path / "out").mkdir()
    assert plan_run(settings(tmp_path)).action == "start"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_with_other_things_is_refused_unless_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="thesis.txt.*overwrite_output_dir"):
        plan_run(settings(tmp_path))
    given = settings(tmp_path, overwrite_output_dir=True)
    begin_run(tmp_path / "out", given, plan_run(given))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="which is a file"):
        plan_run(settings(tmp_path))


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_same_command_goes_on_from_the_last_checkpoint(tmp_path, overwrite):
    given = run(tmp_path, steps=(10, 20), overwrite_output_dir=overwrite)
    plan = plan_run(given)
    assert (plan.action, plan.checkpoint.name) == ("resume", "checkpoint-20")
    stopped_early = run(tmp_path / "early", overwrite_output_dir=overwrite)
    assert plan_run(stopped_early).action == "start"


def test_overwriting_begins_afresh_where_it_is_another_run_or_a_finished_one(tmp_path):
    run(tmp_path, steps=(10,))
    other = settings(tmp_path, learning_rate=1.0)
    assert plan_run(other).action == "resume"
    plan = plan_run({**other, "overwrite_output_dir": True})
    assert plan.action == "start"
    begin_run(tmp_path / "out", other, plan)
    assert not (tmp_path / "out" / "checkpoint-10").exists()

    done = run(tmp_path / "b", steps=(10,), finished=True)
    assert plan_run(done).action == "done"
    assert plan_run({**done, "overwrite_output_dir": True}).action == "start"
    with pytest.raises(UserError, match="finished run with other settings"):
        plan_run({**done, "learning_rate": 1.0})
    assert plan_run({**done, "max_steps": 99, "resume_from_checkpoint": True}).checkpoint.name == "checkpoint-10"


def test_a_checkpoint_of_another_model_is_not_gone_on_with(tmp_path):
    (tmp_path / "model").mkdir()
    given = run(tmp_path, steps=(10,), model_name_or_path=str(tmp_path / "model"))
    for changes in ({"model_name_or_path": str(tmp_path)}, {"lora": True}, {"version": "v1"}):
        with pytest.raises(UserError, match=f"unfinished run with {next(iter(changes))}"):
            plan_run({**given, **changes})
        assert plan_run({**given, **changes, "overwrite_output_dir": True}).action == "start"
        assert plan_run({**given, **changes, "resume_from_checkpoint": True}).action == "resume"
    other_words = {"model_name_or_path": f"{tmp_path}/./model", "lora": False}
    assert plan_run({**given, **other_words}).action == "resume"


def test_no_adapter_is_put_beside_a_whole_model(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_bytes(b"")
    given = settings(tmp_path, overwrite_output_dir=True)
    assert plan_run(given).action == "start"
    with pytest.raises(UserError, match="holds a whole model .*beside which an adapter would not be read"):
        plan_run({**given, "lora": True})


def test_other_data_are_another_run(tmp_path):
    data = tmp_path / "train.json"
    data.write_text("[]")
    given = settings(tmp_path, overwrite_output_dir=True)
    begin_run(tmp_path / "out", given, plan_run(given, [data]), [data])
    checkpoint(tmp_path / "out", 5)
    assert plan_run(given, [data]).action == "resume"
    data.write_text("[1]")
    assert plan_run(given, [data]).action == "start"


def test_a_finished_run_is_done_while_its_weights_are_the_same(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"first")
    given = run(tmp_path, finished=True, model_name_or_path=str(model), do_train=False, do_eval=True)
    assert plan_run(given).action == "done"
    (model / "notes.txt").write_text("read by nobody")
    assert plan_run(given).action == "done"
    (model / "model.safetensors").write_bytes(b"trained again")
    with pytest.raises(UserError, match="a finished run with other data or weights; name another folder"):
        plan_run(given)
    assert plan_run({**given, "overwrite_output_dir": True}).action == "start"
    (model / "model.safetensors").unlink()  # a stage before this one that was tidied up
    assert plan_run(given).action == "done"


def test_an_unfinished_run_goes_on_though_its_model_was_fetched_again(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    given = run(tmp_path, steps=(10,), model_name_or_path=str(model), overwrite_output_dir=True)
    os.utime(model / "model.safetensors", (1, 1))
    assert plan_run(given).action == "resume"


def test_resuming_can_be_asked_for_and_forbidden(tmp_path):
    given = run(tmp_path, steps=(10, 20, 30))
    first = tmp_path / "out" / "checkpoint-10"
    plan = plan_run({**given, "resume_from_checkpoint": str(first)})
    assert plan.checkpoint == first and {path.name for path in plan.stale} == {"checkpoint-20", "checkpoint-30"}
    with pytest.raises(UserError, match="resume_from_checkpoint is false"):
        plan_run({**given, "resume_from_checkpoint": False})
    afresh = plan_run({**given, "resume_from_checkpoint": False, "overwrite_output_dir": True})
    assert afresh.action == "start"
    with pytest.raises(UserError, match="isn't a folder"):
        plan_run({**given, "resume_from_checkpoint": "nowhere"})
    with pytest.raises(UserError, match="no whole checkpoint"):
        plan_run(settings(tmp_path / "new", resume_from_checkpoint=True))


def shorten(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_a_checkpoint_that_is_named_by_a_link_or_a_copy_stays(tmp_path):
    given = run(tmp_path, steps=(10, 20, 30))
    out = tmp_path / "out"
    for step in (10, 20, 30):
        (out / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (out / "latest").symlink_to("checkpoint-20")
    shutil.copytree(out / "checkpoint-20", out / "keep-20")
    for name in ("latest", "keep-20", "checkpoint-20"):
        plan = plan_run({**given, "resume_from_checkpoint": str(out / name)})
        assert plan.checkpoint == out / name and plan.stale == (out / "checkpoint-30",)


def test_data_are_the_same_wherever_they_are_and_whenever_they_were_written(tmp_path):
    (tmp_path / "train.json").write_text("[1]")
    given = settings(tmp_path, overwrite_output_dir=True)
    begin_run(tmp_path / "out", given, plan_run(given), [tmp_path / "train.json"])
    checkpoint(tmp_path / "out", 10)
    (tmp_path / "copy.json").write_text("[1]")
    os.utime(tmp_path / "copy.json", (1, 1))
    assert plan_run(given, [tmp_path / "copy.json"]).action == "resume"
    (tmp_path / "copy.json").write_text("[2]")
    assert plan_run(given, [tmp_path / "copy.json"]).action == "start"


def test_steps_that_count_from_0_again_need_a_folder_of_their_own(tmp_path):
    given = run(tmp_path, steps=(10,), ignore_load_lr_and_optim=True)
    with pytest.raises(UserError, match="ignore_load_lr_and_optim counts steps from 0.*name another output_dir"):
        plan_run(given)
    apart = {
        **given,
        "output_dir": str(tmp_path / "b"),
        "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-10"),
    }
    assert plan_run(apart).action == "resume"


def test_what_a_full_disk_leaves_is_no_obstacle(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json.tmp123").write_text("{")
    given = settings(tmp_path)
    plan = plan_run(given)
    begin_run(tmp_path / "out", given, plan)
    assert plan.action == "start" and [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]
    (tmp_path / "out" / "thesis.tmp1").write_text("mine")
    begin_run(tmp_path / "out", given, plan)
    assert (tmp_path / "out" / "thesis.tmp1").read_text() == "mine"
    (tmp_path / "out" / "thesis.tmp1").unlink()
    with pytest.raises(TypeError):
        write_json(tmp_path / "out" / "other.json", object())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: shorten(folder / "model.safetensors"),
        lambda folder: flip(folder / "model.safetensors"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / MARKER).unlink(),
        lambda folder: (folder / MARKER).write_text('{"files"'),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
    ],
    ids=["cut short", "one bit", "file gone", "no marker", "half a marker", "emptied"],
)
def test_a_broken_checkpoint_is_never_picked(tmp_path, harm):
    given = run(tmp_path, steps=(10, 20))
    last = tmp_path / "out" / "checkpoint-20"
    assert is_whole(last)
    harm(last)
    assert not is_whole(last)
    assert find_checkpoint(tmp_path / "out").name == "checkpoint-10"
    assert plan_run(given).checkpoint.name == "checkpoint-10"
    with pytest.raises(UserError, match="isn't a whole checkpoint"):
        plan_run({**given, "resume_from_checkpoint": str(last)})
    plan = plan_run(given)
    begin_run(tmp_path / "out", given, plan)
    assert not last.exists() and (tmp_path / "out" / "checkpoint-10").exists()


def test_a_toolkit_checkpoint_is_not_taken_for_ours(tmp_path):
    folder = tmp_path / "out" / "checkpoint-7"
    folder.mkdir(parents=True)
    (folder / "model_state.pdparams").write_bytes(b"x")
    with pytest.raises(UserError, match="no run of this tool"):
        plan_run(settings(tmp_path))


def test_a_half_written_checkpoint_has_no_checkpoints_name(tmp_path):
    given = run(tmp_path, steps=(10,))
    partial = tmp_path / "out" / ".partial-checkpoint-20"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    plan = plan_run(given)
    assert plan.checkpoint.name == "checkpoint-10"
    begin_run(tmp_path / "out", given, plan)
    assert not partial.exists()


def test_old_checkpoints_go_but_the_best_stays(tmp_path):
    for step in (10, 20, 30, 100):
        checkpoint(tmp_path, step)
    remove_old_checkpoints(tmp_path, keep=2, best=str(tmp_path / "checkpoint-10"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-100"}
    remove_old_checkpoints(tmp_path, keep=1, best=str(tmp_path / "checkpoint-10"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-100"}
    remove_old_checkpoints(tmp_path, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-100"}


def test_files_written_aside_come_together_or_not_at_all(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), write_aside(tmp_path) as aside:
        (aside / "a.txt").write_text("new")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with write_aside(tmp_path) as aside:
        (aside / "a.txt").write_text("new")
        (aside / "b.txt").write_text("also")
    assert (tmp_path / "a.txt").read_text() == "new" and sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt"]


def test_a_run_begun_afresh_finds_no_predictions_of_the_one_before(tmp_path):
    given = run(tmp_path, finished=True, do_train=True)
    names = ["eval_predictions-7.jsonl", "predictions-7.jsonl", "eval_results.json", "predict_results.json"]
    for name in [*names, "my_results.json"]:
        (tmp_path / "out" / name).write_text("{}")
    again = {**given, "overwrite_output_dir": True}
    begin_run(tmp_path / "out", again, plan_run(again))
    assert sorted(os.listdir(tmp_path / "out")) == ["my_results.json", "run.json"]


def test_going_on_is_for_runs_that_train(tmp_path):
    given = run(tmp_path, steps=(10,))
    for changes in ({"do_train": False, "do_eval": True}, {"benchmark": True}):
        with pytest.raises(UserError, match="resume_from_checkpoint is set, but this run trains no model"):
            plan_run({**given, **changes, "overwrite_output_dir": True, "resume_from_checkpoint": True})


def test_the_run_is_recorded(tmp_path):
    run(tmp_path)
    recorded = json.loads((tmp_path / "out" / "run.json").read_text())
    assert recorded["status"] == "running" and recorded["settings"]["learning_rate"] == 1e-3
