"""What the DAG `answers` and its test agree on."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

MODELS = {"Qwen/Qwen3-32B": {"enable_thinking": False}, "deepseek-ai/DeepSeek-V3": {}}
PRICES = {model: {"prompt": 1.0, "completion": 4.0, "thinking": 0} for model in MODELS}


class Review(BaseModel):
    mood: Literal["good", "bad"]
    stars: int = Field(ge=1, le=5)
    topic: str
    price: float
    words: list[str]
