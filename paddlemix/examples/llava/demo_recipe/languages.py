"""The words in which the recipe asks and answers, English and Chinese: the same forms in both."""

from dataclasses import dataclass
from typing import Dict, Sequence, Tuple

from paddlemix.examples.llava.demo_recipe.scenes import SceneObject

__all__ = ["CHINESE", "ENGLISH", "LANGUAGES", "Language"]


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@dataclass(frozen=True)
class Language:
    """Words and forms of one language.

    Attributes:
        words: of colours, shapes, sizes, parts of the picture and relations, by their English word.
        questions: by kind; ``{}`` stands for what is asked about.
        sentences: answers in a sentence, by kind (and outcome).
        sides: the short answer for each relation, where both of an axis are offered.
        in_a_sentence: what a question ends in that wants such an answer.
    """

    code: str
    words: Dict[str, str]
    questions: Dict[str, Tuple[str, ...]]
    sentences: Dict[str, str]
    sides: Dict[str, str]
    in_a_sentence: str
    joint: str  # between a question and ``in_a_sentence``
    yes_no: Tuple[str, str]
    there: Tuple[str, str]  # yes and no to "is there …"
    comma: str
    last_comma: str

    def word(self, english: str) -> str:
        return self.words.get(english, english)

    def name(self, color: str, shape: str) -> str:
        """``red circle``"""
        return self._join(self.word(color), self.word(shape))

    def object_name(self, obj: SceneObject) -> str:
        return self.name(obj.color, obj.shape)

    def full_name(self, obj: SceneObject) -> str:
        """``small red circle``"""
        return self._join(self.word(obj.size), self.object_name(obj))

    def one(self, name: str) -> str:
        """``a small red circle``"""
        return _with_article(name) if self.code == "en" else f"一个{name}"

    def counted(self, name: str) -> str:
        """What stands in a question for a number of them: ``circles``."""
        return f"{name}{'es' if name.endswith('s') else 's'}" if self.code == "en" else name

    def enumeration(self, parts: Sequence[str]) -> str:
        """``a, b and c``"""
        return parts[0] if len(parts) == 1 else self.comma.join(parts[:-1]) + self.last_comma + parts[-1]

    def _join(self, *words: str) -> str:
        return (" " if self.code == "en" else "").join(words)


ENGLISH = Language(
    code="en",
    words={},
    questions={
        "exist": ("Is there {}?", "Is there {} in the picture?", "Do you see {}?"),
        "color": ("What color is the {}?", "What is the color of the {}?"),
        "shape": ("What shape is the {} object?", "What is the {} shape?"),
        "size": ("Is the {} small or large?", "How large is the {}, small or large?"),
        "count": ("How many {} are there?", "How many {} do you see?"),
        "position": ("In which part of the picture is the {}?", "Which part of the picture is the {} in?"),
        "relation": ("Is the {} {} the {}?",),
        "side": ("Is the {0} {1} or {2} the {3}?",),
        "box": ("Give the box of the {}.", "Where is the {}? Give its box."),
        "region": ("What is in the box {}?", "Describe the box {}."),
        "caption": ("Describe the picture.", "What is in the picture?", "What do you see?"),
        "list": ("List the objects with their boxes.",),
    },
    sentences={
        "exist yes": "Yes, there is {}.",
        "exist no": "No, there is no {}.",
        "color": "The {} is {}.",
        "shape": "The {} object is {}.",
        "size": "The {} is {}.",
        "count": "There are {} {}.",
        "count one": "There is 1 {}.",
        "position": "The {} is at the {}.",
        "relation yes": "Yes, the {} is {} the {}.",
        "relation no": "No, the {} is not {} the {}.",
        "side": "The {} is {} the {}.",
        "caption": "The picture shows {}.",
    },
    sides={"to the left of": "left", "to the right of": "right", "above": "above", "below": "below"},
    in_a_sentence="Answer in a sentence.",
    joint=" ",
    yes_no=("yes", "no"),
    there=("yes", "no"),
    comma=", ",
    last_comma=" and ",
)

CHINESE = Language(
    code="zh",
    words={
        "red": "红色",
        "green": "绿色",
        "blue": "蓝色",
        "yellow": "黄色",
        "teal": "青色",
        "brown": "棕色",
        "gray": "灰色",
        "black": "黑色",
        "orange": "橙色",
        "purple": "紫色",
        "circle": "圆形",
        "rectangle": "长方形",
        "triangle": "三角形",
        "star": "星形",
        "diamond": "菱形",
        "cross": "十字形",
        "object": "物体",
        "small": "小",
        "large": "大",
        "top left": "左上",
        "top": "上",
        "top right": "右上",
        "left": "左",
        "center": "中间",
        "right": "右",
        "bottom left": "左下",
        "bottom": "下",
        "bottom right": "右下",
        "to the left of": "左边",
        "to the right of": "右边",
        "above": "上面",
        "below": "下面",
    },
    questions={
        "exist": ("有{}吗?", "图中有{}吗?", "你看到{}了吗?"),
        "color": ("{}是什么颜色?", "{}的颜色是什么?"),
        "shape": ("{}的物体是什么形状?", "{}的是什么形状?"),
        "size": ("{}是小还是大?", "{}有多大,小还是大?"),
        "count": ("有几个{}?", "图中有几个{}?"),
        "position": ("{}在图中的哪个位置?", "{}在哪个位置?"),
        "relation": ("{0}在{2}的{1}吗?",),
        "side": ("{0}在{3}的{1}还是{2}?",),
        "box": ("给出{}的框。", "{}在哪里?给出它的框。"),
        "region": ("框 {} 里是什么?", "描述框 {}。"),
        "caption": ("描述这张图。", "图中有什么?", "你看到了什么?"),
        "list": ("列出物体和它们的框。",),
    },
    sentences={
        "exist yes": "有,图中有{}。",
        "exist no": "没有,图中没有{}。",
        "color": "{}是{}的。",
        "shape": "{}的物体是{}。",
        "size": "{}是{}的。",
        "count": "图中有{}个{}。",
        "count one": "图中有1个{}。",
        "position": "{}在{}。",
        "relation yes": "是的,{0}在{2}的{1}。",
        "relation no": "不,{0}不在{2}的{1}。",
        "side": "{0}在{2}的{1}。",
        "caption": "图中有{}。",
    },
    sides={"to the left of": "左边", "to the right of": "右边", "above": "上面", "below": "下面"},
    in_a_sentence="请用一句话回答。",
    joint="",
    yes_no=("是", "不是"),
    there=("有", "没有"),
    comma="、",
    last_comma="和",
)

LANGUAGES = {"en": ENGLISH, "zh": CHINESE}
