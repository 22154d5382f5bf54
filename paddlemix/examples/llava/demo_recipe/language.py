"""Rows without a picture, which keep the decoder's language: common questions with the answers that it gives already."""

from typing import Any, Dict, List

__all__ = ["text_rows"]

QUESTIONS = (
    "What is the capital of France?",
    "What is the capital of Japan?",
    "What is water made of?",
    "Why is the sky blue?",
    "What is photosynthesis?",
    "What is a noun?",
    "Hello! How are you?",
    "What can you help me with?",
    "Write a short poem about the sea.",
    "Give me three tips for a good night's sleep.",
    "What is the largest planet in the solar system?",
    "How many days are there in a week?",
    "What do bees make?",
    "Explain gravity in one sentence.",
    "Name three fruits.",
    "What is the opposite of hot?",
    "What is a computer program?",
    "How do I boil an egg?",
    "What language is spoken in Brazil?",
    "What is the boiling point of water?",
    "Who are you?",
    "Thank you for your help!",
)


def text_rows(model, processor, max_new_tokens: int = 48) -> List[Dict[str, Any]]:
    """One row per question; an answer that the limit cuts ends with its last whole sentence."""
    template = processor.template
    prompts = [
        template.render([{"role": "user", "content": question}], add_generation_prompt=True) for question in QUESTIONS
    ]
    ids, _ = model.generate(**processor(text=prompts), max_new_tokens=max_new_tokens)
    ends = set(processor.config.eos_token_ids)
    rows = []
    for question, answer_ids in zip(QUESTIONS, ids.tolist()):
        answer = processor.decode(answer_ids).strip()
        if not ends & set(answer_ids) and "." in answer:
            answer = answer[: answer.rindex(".") + 1]
        rows.append({"conversations": [[question, answer]]})
    return rows
