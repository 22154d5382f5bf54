"""Rows without a picture, which keep the decoder's language: common questions with the answers that it gives already."""

from typing import Any, Dict, List

__all__ = ["text_rows"]

_PLAIN = (
    "What is water made of?",
    "Why is the sky blue?",
    "Hello! How are you?",
    "What can you help me with?",
    "Write a short poem about the sea.",
    "Give me three tips for a good night's sleep.",
    "What is the largest planet in the solar system?",
    "How many days are there in a week?",
    "What do bees make?",
    "Name three fruits.",
    "How do I boil an egg?",
    "What is the boiling point of water?",
    "Who are you?",
    "Thank you for your help!",
    "Which river flows through Paris?",
    "Which river flows through London?",
    "Which is the longest river in the world?",
    "What is the highest mountain in the world?",
    "What is the largest ocean?",
    "How many continents are there?",
    "How many legs does a spider have?",
    "What is two plus two?",
    "What is ten minus three?",
    "Name the seasons of the year.",
    "Name three animals that live in the sea.",
    "Name the primary colors.",
    "What is the color of grass?",
    "Who wrote Romeo and Juliet?",
    "Who painted the Mona Lisa?",
    "Tell me a short story about a cat.",
    "Write a sentence about the moon.",
    "Write a thank-you note to a friend.",
    "How can I learn to draw?",
    "What should I eat for breakfast?",
    "Give me a recipe for pancakes.",
    "What is a good name for a dog?",
    "How do I say hello in Spanish?",
    "How do I say thank you in French?",
)
_COUNTRIES = (
    "France Japan Germany Italy Spain Canada Brazil China India Egypt Russia Greece Poland Sweden Norway".split()
)
_COUNTRIES += "Mexico Australia Portugal Austria Argentina Kenya Turkey Ireland Denmark Cuba Peru Thailand".split()
_THINGS = "photosynthesis gravity electricity democracy music friendship inflation evolution poetry happiness".split()
_THINGS += "mathematics physics chemistry biology history geography philosophy economics art time".split()
_NOUNS = (
    "noun,verb,computer program,triangle,circle,prime number,volcano,planet,star,atom,molecule,cell,galaxy,dictionary"
)
_NOUNS += (
    ",library,telescope,microscope,robot,bicycle,bridge,river,desert,island,vaccine,virus,tree,whale,bird,novel,map"
)
_WORDS = "hot big fast happy light old early strong easy rich full loud dry clean young".split()

QUESTIONS = (
    *_PLAIN,
    *(f"What is the capital of {country}?" for country in _COUNTRIES),
    *(f"What language is spoken in {country}?" for country in _COUNTRIES),
    *(f"What is {thing}?" for thing in _THINGS),
    *(f"Explain {thing} in one sentence." for thing in _THINGS),
    *(f"What is a {noun}?" for noun in _NOUNS.split(",")),
    *(f"What is the opposite of {word}?" for word in _WORDS),
)


def text_rows(model, processor, max_new_tokens: int = 48, batch_size: int = 30) -> List[Dict[str, Any]]:
    """One row per question; an answer that the limit cuts ends with its last whole sentence."""
    template, ends = processor.template, set(processor.config.eos_token_ids)
    rows = []
    for start in range(0, len(QUESTIONS), batch_size):
        asked = QUESTIONS[start : start + batch_size]
        prompts = [template.render([{"role": "user", "content": q}], add_generation_prompt=True) for q in asked]
        ids, _ = model.generate(**processor(text=prompts), max_new_tokens=max_new_tokens)
        for question, answer_ids in zip(asked, ids.tolist()):
            answer = processor.decode(answer_ids).strip()
            if not ends & set(answer_ids) and "." in answer:
                answer = answer[: answer.rindex(".") + 1]
            rows.append({"conversations": [[question, answer]]})
    return rows
