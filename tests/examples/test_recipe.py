"""The recipe of the default model: pictures and answers agree, data is repeatable, the training goes on where it stopped."""

import json
import random
import re
import shutil

import numpy as np
import pytest

from paddlemix.evaluation import find_box
from paddlemix.examples.llava.demo_recipe import data, easy_vqa_data, questions, scenes
from paddlemix.examples.llava.demo_recipe.languages import CHINESE, ENGLISH
from paddlemix.examples.llava.demo_recipe.run import parse

SEEDS = range(200)


def pixels_of(scene, obj, image):
    """Where the picture is more of the object's colour than of the background, inside the object's surroundings."""
    pixels = np.asarray(image, dtype=float)
    color, background = np.array(scenes.COLORS[obj.color], float), np.array(scene.background, float)
    nearer = ((pixels - color) ** 2).sum(-1) < ((pixels - background) ** 2).sum(-1)
    side = len(pixels)
    left, top, right, bottom = (round(v * side) for v in obj.box)
    window = np.zeros_like(nearer)
    window[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = True
    return nearer & window


def test_what_is_drawn_is_what_the_scene_says():
    for seed in SEEDS:
        scene = scenes.make_scene(seed)
        image = scenes.draw_scene(scene, 128)
        for obj in scene.objects:
            rows, columns = np.where(pixels_of(scene, obj, image))
            drawn = (columns.min() / 128, rows.min() / 128, (columns.max() + 1) / 128, (rows.max() + 1) / 128)
            np.testing.assert_allclose(drawn, obj.box, atol=3 / 128, err_msg=f"{seed} {obj.name}")


def test_scenes_follow_from_their_seed_and_tests_are_apart():
    assert scenes.make_scene(5) == scenes.make_scene(5) != scenes.make_scene(6)
    assert scenes.draw_scene(scenes.make_scene(5)).tobytes() == scenes.draw_scene(scenes.make_scene(5)).tobytes()
    assert len(scenes.TEST_SEEDS) == 500
    trained = {data.ALIGN_SEED + 10**6, data.INSTRUCT_SEED + 10**6, 10**8}
    assert max(trained) < scenes.TEST_SEEDS.start
    test = {scenes.draw_scene(scenes.make_scene(seed)).tobytes() for seed in scenes.TEST_SEEDS}
    assert not test & {scenes.draw_scene(scenes.make_scene(data.INSTRUCT_SEED + seed)).tobytes() for seed in range(500)}


def facts(scene):
    return [(obj.color, obj.shape, obj.size, obj.box, obj.center) for obj in scene.objects]


def check(question, answer, scene):
    """Answers the question anew from the list of objects, for the forms that a pattern can read."""
    objects = facts(scene)
    short = question.replace(" " + questions.IN_A_SENTENCE, "")

    def named(words):
        return [o for o in objects if all(word in o[:3] for word in words)]

    match = re.fullmatch(r"(?:Is there|Do you see) an? (.+?)(?: in the picture)?\?", short)
    if match:
        return answer.lower().startswith("yes") == bool(named(match[1].split()))
    match = re.fullmatch(r"How many (.+?) (?:are there|do you see)\?", short)
    if match:
        words = re.sub(r"es$", "", match[1]) if match[1].endswith("crosses") else match[1][:-1]
        words = [word for word in words.split() if word != "object"]
        return str(len(named(words))) in answer
    match = re.fullmatch(r"What (?:color is the|is the color of the) (\w+)\?", short)
    if match:
        (only,) = named([match[1]])
        return only[0] in answer
    match = re.fullmatch(r"(?:What shape is the (\w+) object|What is the (\w+) shape)\?", short)
    if match:
        (only,) = named([match[1] or match[2]])
        return only[1] in answer
    match = re.fullmatch(
        r"Is the (\w+ \w+) (?:to the left of or to the right of|above or below) the (\w+ \w+)\?", short
    )
    if match:
        (a,), (b,) = named(match[1].split()), named(match[2].split())
        axis, sides = (0, ("left", "right")) if "left" in short else (1, ("above", "below"))
        right = sides[a[4][axis] > b[4][axis]]
        return [word for word in re.findall(r"\w+", answer) if word in sides] == [right]
    match = re.fullmatch(r"Is the (\w+ \w+) (.+) the (\w+ \w+)\?", short)
    if match:
        (a,), (b,) = named(match[1].split()), named(match[3].split())
        axis = 0 if "left" in match[2] or "right" in match[2] else 1
        before = a[4][axis] < b[4][axis]
        return answer.lower().startswith("yes") == (before == (match[2] in ("to the left of", "above")))
    match = re.fullmatch(r"(?:Give the box of the|Where is the) (\w+ \w+)[.?](?: Give its box\.)?", short)
    if match:
        (only,) = named(match[1].split())
        return np.allclose(find_box(answer), only[3], atol=0.011)
    match = re.fullmatch(r"(?:What is in|Describe) the box (.+)[.?]", short)
    if match:
        (only,) = [o for o in objects if np.allclose(find_box(match[1]), o[3], atol=0.011)]
        return all(word in answer for word in only[:3])
    return None


MIXTURES = [None, data.KINDS] + [kinds for plan in data.PLANS.values() for kinds in (plan.related, plan.other)]


def test_answers_are_right():
    for mixture in MIXTURES:
        read = 0
        for seed in SEEDS:
            scene = scenes.make_scene(seed)
            for made in questions.conversation(scene, 12, random.Random(seed), mixture):
                right = check(made.question, made.answer, scene)
                assert right is not False, (seed, made)
                read += right is not None
        assert read > 500


def test_chinese_says_the_same():
    """Short answers and boxes of one seed are each other's translation; sentences name the same things."""
    short = 0
    sides = dict(zip(ENGLISH.sides.values(), CHINESE.sides.values()))
    for seed in SEEDS:
        scene = scenes.make_scene(seed)
        kinds = dict.fromkeys((*questions.QUESTION_TYPES, "side"), 1)
        english = questions.conversation(scene, 12, random.Random(seed), kinds)
        chinese = questions.conversation(scene, 12, random.Random(seed), kinds, CHINESE)
        assert [made.kind for made in english] == [made.kind for made in chinese]
        for en, zh in zip(english, chinese):
            assert not re.search("[a-z]", zh.question + zh.answer)
            words = CHINESE.there if en.kind == "exist" else CHINESE.yes_no
            expected = {"yes": words[0], "no": words[1]}.get(en.answer, CHINESE.word(en.answer))
            expected = sides.get(en.answer, expected) if en.kind == "side" else expected
            if en.kind in ("side", "color", "shape", "size", "position", "relation", "exist", "count", "box"):
                if not en.question.endswith(questions.IN_A_SENTENCE):
                    assert zh.answer == expected
                    short += 1
            elif en.kind in ("caption", "list"):
                assert all(CHINESE.full_name(obj) in zh.answer for obj in scene.objects)
    assert short > 800


def test_a_chat_asks_nothing_twice_and_gives_no_box_away():
    for seed in SEEDS:
        chat = questions.conversation(scenes.make_scene(seed), 12, random.Random(seed), data.KINDS)
        assert len({made.question for made in chat}) == len(chat) >= 4
        boxes = [re.findall(r"0\.\d\d(?:, 0\.\d\d){3}", f"{m.question} {m.answer}") for m in chat if m.kind != "list"]
        flat = [box for found in boxes for box in found]
        assert len(flat) == len(set(flat))


@pytest.mark.parametrize("stage", data.PLANS)
def test_no_round_answers_another(stage):
    """A relation or side is asked once for two objects and an axis, whichever is named first; any other fact in one form."""
    relations = facts = 0
    for seed in SEEDS:
        for kinds in (data.PLANS[stage].related, data.PLANS[stage].other):
            chat = questions.conversation(scenes.make_scene(seed, 3), 12, random.Random(seed), kinds)
            pairs = []
            for made in chat:
                if made.kind in ("relation", "side"):
                    asked = made.question.split(" Answer")[0]
                    a, relation, b = re.fullmatch(r"Is the (\w+ \w+) (.+) the (\w+ \w+)\?", asked).groups()
                    pairs.append((frozenset((a, b)), "left" in relation or "right" in relation))
            assert len(set(pairs)) == len(pairs)
            positions = [
                re.search(r"(?:is the|picture is the) (\w+ \w+)", m.question)[1] for m in chat if m.kind == "position"
            ]
            assert len(set(positions)) == len(positions)
            relations, facts = relations + len(pairs), facts + len(positions)
    assert relations > 100 and facts > 50


def test_most_chats_count_before_they_name_an_object():
    later = 0
    for seed in SEEDS:
        kinds = [
            m.kind for m in questions.conversation(scenes.make_scene(seed, 3), 12, random.Random(seed), data.KINDS)
        ]
        rest = [kind for kind in kinds if kind not in ("caption", "list")]
        later += rest == sorted(rest, key=lambda kind: {"count": 0, "exist": 1}.get(kind, 2))
    assert 0.5 < later / len(SEEDS) < 0.9


def test_every_kind_of_question_is_asked():
    kinds = {m.kind for s in SEEDS for m in questions.conversation(scenes.make_scene(s), 12, random.Random(s))}
    assert kinds == set(questions.QUESTION_TYPES)
    taught = set()
    for mixture in MIXTURES[1:]:
        for seed in SEEDS:
            taught |= {
                made.kind for made in questions.conversation(scenes.make_scene(seed), 12, random.Random(seed), mixture)
            }
    assert taught == kinds | {"side"}


def test_data_files_are_repeatable_rows_of_the_toolkits_format(tmp_path):
    from paddlemix.processors.rows import parse_row

    easy = easy_vqa_data.find_easy_vqa()
    for name in ("a", "b"):
        data.write_data(
            tmp_path / name,
            easy,
            align_rows=3,
            instruct_scenes=4,
            instruct_easy=3,
            chinese=0.5,
            seed=1,
        )
    for file in (
        "align.json",
        "instruct.json",
        "scenes_test.json",
        "scenes_test_zh.json",
        "easy_vqa_test.json",
    ):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        for row in json.loads((tmp_path / "a" / file).read_bytes())[:50]:
            messages, images = parse_row(row)
            assert len(images) == 1 and (tmp_path / "a" / images[0]).is_file() and messages
    assert len(json.loads((tmp_path / "a" / "easy_vqa_test.json").read_text())) == 9673
    chinese = re.compile("[\u4e00-\u9fff]")
    assert chinese.search((tmp_path / "a" / "instruct.json").read_text())
    trained = (tmp_path / "a" / "instruct.json").read_text()
    assert "test/images" not in trained and "train/images" in trained


@pytest.fixture(scope="module")
def later_chats(tmp_path_factory):
    """The files of stages 4 to 7, 120 scenes each, and what they were made with."""
    folder = tmp_path_factory.mktemp("chats")
    text = [{"conversations": [["Which river flows through Paris?", "The Seine."]]}]

    def write(stage, name="a"):
        data.write_chats(folder / name, stage, 120, easy_vqa_data.find_easy_vqa(), 5, text, 1)
        return folder / name / f"{stage}.json"

    return write


def asked_in(path):
    return [question for row in json.loads(path.read_text()) for question, _ in row["conversations"]]


@pytest.mark.parametrize("stage", data.PLANS)
def test_chats_of_later_stages(later_chats, stage):
    from paddlemix.processors.rows import parse_row

    path = later_chats(stage)
    written = path.stat().st_mtime_ns
    assert path.read_bytes() == later_chats(stage, "b").read_bytes()
    assert later_chats(stage).stat().st_mtime_ns == written  # a stopped training finds its data unchanged
    rows = json.loads(path.read_text())
    assert len(rows) == 125
    for row in rows:
        messages, images = parse_row(row)
        assert len(images) == 1 and messages and "test/images" not in images[0]
    behind = sum("river" in row["conversations"][-1][0] for row in rows)
    assert 3 < behind < 30
    text = path.read_text()
    assert "train/images" in text and not re.search("[\u4e00-\u9fff]", text)


def test_sides_come_first_then_one_word_more_often_then_both_alike_and_last_all_kinds(later_chats):
    counts = {}
    for stage in data.PLANS:
        asked = asked_in(later_chats(stage))
        both = sum("left of or" in question or "above or" in question for question in asked)
        words = [" left of the", " right of the", " above the", " below the"]
        counts[stage] = both, *(sum(word in q for q in asked if " or " not in q) for word in words)
    both, *words = counts["sides"]
    assert both > 300 and not any(words)
    _, left, right, above, below = counts["relations"]
    assert 2 * right < left < 4.5 * right and 2 * below < above < 4.5 * below and left + right > above + below
    for stage in ("balance", "rest"):
        both, left, right, above, below = counts[stage]
        assert (
            (both > 0) == (stage == "rest")
            and 0.7 < left / right < 1.43
            and 0.6 < above / below < 1.67
            and left + right > above + below
        )
    relations = {stage: sum(count) / len(asked_in(later_chats(stage))) for stage, count in counts.items()}
    assert relations["relations"] > relations["balance"] > 1.5 * relations["rest"] > 0.2


def test_labels_of_easy_vqa_follow_from_its_questions():
    asked = [
        ("what color is the shape?", "teal", 1),
        ("is there not a circle?", "no", 1),
        ("is there a red shape?", "yes", 2),
        ("is no triangle present?", "yes", 2),
        ("what is the blue shape?", "rectangle", 3),
    ]
    assert easy_vqa_data.object_labels(asked) == {
        1: {"color": "teal", "shape": "circle"},
        2: {"color": "red"},
        3: {"color": "blue", "shape": "rectangle"},
    }


@pytest.fixture
def small_easy_vqa(tmp_path):
    """Ten of easy-VQA's train pictures and their questions."""
    easy, small = easy_vqa_data.find_easy_vqa(), tmp_path / "easy" / "train"
    (small / "images").mkdir(parents=True)
    asked = [item for item in easy_vqa_data.read_questions(easy, "train") if item[2] < 10]
    (small / "questions.json").write_text(json.dumps(asked))
    for number in range(10):
        shutil.copyfile(easy / "train" / "images" / f"{number}.png", small / "images" / f"{number}.png")
    return small.parent


VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8
)


def test_pretraining_goes_on_where_it_was_stopped(tmp_path, monkeypatch, small_easy_vqa):
    from safetensors.numpy import load_file

    from paddlemix.examples.llava.demo_recipe import pretrain_tower

    monkeypatch.setattr(pretrain_tower, "VALIDATION_SEEDS", range(900_000_000, 900_000_008))
    options = dict(vision=VISION, steps=4, batch_size=4, save_minutes=0, easy_vqa=str(small_easy_vqa))
    pretrain_tower.pretrain(str(tmp_path / "whole"), **options)

    original = pretrain_tower.batch_of_step

    def stopping(step, *arguments):
        if step == 2:
            raise KeyboardInterrupt
        return original(step, *arguments)

    monkeypatch.setattr(pretrain_tower, "batch_of_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        pretrain_tower.pretrain(str(tmp_path / "stopped"), **options)
    monkeypatch.setattr(pretrain_tower, "batch_of_step", original)
    pretrain_tower.pretrain(str(tmp_path / "stopped"), **options)

    whole, stopped = (load_file(str(tmp_path / name / "tower.safetensors")) for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    for name in whole:
        np.testing.assert_allclose(whole[name], stopped[name], atol=1e-6, err_msg=name)


def test_labels_stand_in_the_cell_of_the_objects_centre():
    from paddlemix.examples.llava.demo_recipe import pretrain_tower

    scene = scenes.make_scene(3)
    labels = pretrain_tower.labels_of([(o.size, o.color, o.shape, o.box) for o in scene.objects])
    for obj in scene.objects:
        row, column = scenes.cell_of(obj)
        cell = 4 * row + column
        assert (labels["color"][:, cell] == pretrain_tower.COLOR_NAMES.index(obj.color)).all()
        text = ", ".join(f"0.{first}{second}" for first, second in labels["digits"][:, cell])
        assert text == questions.box_text(obj.box)
    assert (labels["color"] != pretrain_tower.NOTHING_COLOR).sum() == 4 * len(scene.objects)


def test_the_table_says_what_the_scene_does():
    from paddlemix.examples.llava.demo_recipe import write_table

    for seed in SEEDS:
        scene = scenes.make_scene(seed)
        objects = [(o.size, o.color, o.shape, o.box) for o in scene.objects]
        table = write_table.table_of(objects[::-1])  # the order comes from where they are
        cells = [4 * row + column for row, column in map(scenes.cell_of, scene.objects)]
        assert list(table["place"][cells]) == list(range(len(objects)))
        said = [write_table.WORDS[word] for word in table["word"]]
        for row, obj in enumerate(scene.objects):
            fields = said[16 * row : 16 * row + 16]
            assert fields[:4] == [questions.region_of(obj), obj.size, obj.color, obj.shape]
            assert "0" + "".join(fields[4:]).replace(",.", ", 0.") == questions.box_text(obj.box)
            notes = {kind: table[kind][16 * row : 16 * row + 16] for kind in write_table.NOTES}
            assert [note + 1 for note in notes["count"] if note >= 0] == [len(objects)]
            assert table["objects"][cells[row]] + 1 == len(objects)
            steps = [notes[kind][3] for kind in ("x", "y")]
            np.testing.assert_allclose([(step + 0.5) / 8 for step in steps], obj.center, atol=1 / 16)
        assert set(said[16 * len(objects) :]) <= {write_table.EMPTY}


def test_two_more_layers_go_on_where_they_were_stopped(tmp_path, monkeypatch, small_easy_vqa):
    from safetensors.numpy import load_file

    from paddlemix.examples.llava.demo_recipe import pretrain_tower, write_table

    for module in (pretrain_tower, write_table):
        monkeypatch.setattr(module, "VALIDATION_SEEDS", range(900_000_000, 900_000_008))
    easy = str(small_easy_vqa)
    pretrain_tower.pretrain(str(tmp_path / "below"), VISION, steps=1, batch_size=4, easy_vqa=easy)
    below, whole = tmp_path / "below" / "tower.safetensors", {**VISION, "num_hidden_layers": 3}
    options = dict(steps=4, thaw=3, batch_size=4, save_minutes=0, easy_vqa=easy)
    figures = write_table.write_table(str(tmp_path / "whole"), whole, below, **options)
    assert set(figures) == set("part size color shape first second empty place objects count x y".split())

    original = write_table.batch_of_step

    def stopping(step, *arguments):
        if step == 2:
            raise KeyboardInterrupt
        return original(step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(write_table, "batch_of_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            write_table.write_table(str(tmp_path / "stopped"), whole, below, **options)
    write_table.write_table(str(tmp_path / "stopped"), whole, below, **options)
    first, second = (load_file(str(tmp_path / name / "tower.safetensors")) for name in ("whole", "stopped"))
    for name, value in first.items():
        np.testing.assert_allclose(value, second[name], atol=1e-6, err_msg=name)
    write_table.write_table(str(tmp_path / "frozen"), whole, below, **{**options, "steps": 3})
    frozen = load_file(str(tmp_path / "frozen" / "tower.safetensors"))
    for name, value in load_file(str(below)).items():
        np.testing.assert_array_equal(value, frozen[name], err_msg=name)
        assert (value != first[name]).any(), name


def test_the_projector_learns_to_write_words(small_easy_vqa, monkeypatch):
    import paddle

    from paddlemix.examples.llava.demo_recipe import fit_projector, pretrain_tower, write_table

    random_ = np.random.RandomState(0)
    vocabulary = {}
    embeddings = random_.randn(60, 48).astype(np.float32)

    def encode(text):
        return [vocabulary.setdefault(text, len(vocabulary))]

    words, notes = fit_projector.word_embeddings(embeddings, encode), fit_projector.note_embeddings(embeddings, encode)
    for text, word in ((" red", "red"), ("7", "7"), (".", write_table.POINT), ("\n", write_table.EMPTY)):
        np.testing.assert_array_equal(words[write_table.WORDS.index(word)], embeddings[vocabulary[text]])
    left, right = (embeddings[vocabulary[text]] for text in (" left", " right"))
    np.testing.assert_array_equal(notes["count"][1], embeddings[vocabulary["2"]])
    np.testing.assert_allclose(notes["x"][[0, 7]], [(left - right) / 2, (right - left) / 2], atol=1e-6)
    assert all((kind[-1] == 0).all() for kind in notes.values())

    def batch_of_features(step, size, easy, seed):
        """In place of pictures, what a tower that sees everything would make of them: the labels, one-hot."""
        _, table = write_table.batch_of_step(step, size, easy, seed)
        kinds = {"word": len(words), **write_table.NOTES}
        return np.concatenate([np.eye(n + 1, dtype=np.float32)[table[kind]] for kind, n in kinds.items()], -1), table

    monkeypatch.setattr(fit_projector, "batch_of_step", batch_of_features)
    easy = pretrain_tower.EasyVQAPictures(small_easy_vqa)
    paddle.seed(0)
    width = len(words) + 1 + sum(values + 1 for values in write_table.NOTES.values())
    projector = paddle.nn.Sequential(paddle.nn.Linear(width, 96), paddle.nn.GELU(), paddle.nn.Linear(96, 48))
    nearest = fit_projector.fit_projector(lambda x: x, projector, words, notes, easy, steps=400, batch_size=4)
    assert nearest > 0.95


def test_command_line_has_the_defaults_of_the_readme():
    arguments = parse([])
    assert arguments.output_dir == "demo_recipe_out" and arguments.until == "evaluate"
