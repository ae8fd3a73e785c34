"""The script everybody writes: a FastAPI endpoint that calls `session.run`. Here to be compared with."""

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
from fastapi import FastAPI
from pydantic import BaseModel
from tokenizers import Tokenizer

folder = Path(os.environ["PLAIN_MODEL_DIR"])
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_truncation(256)
session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
app = FastAPI()


class Body(BaseModel):
    text: str


@app.post("/predict")
def predict(body: Body) -> dict[str, object]:
    encoding = tokenizer.encode(body.text)
    inputs = {"input_ids": np.array([encoding.ids]), "attention_mask": np.array([encoding.attention_mask])}
    (scores,) = session.run(None, inputs)[0]
    best = int(scores.argmax())
    return {"label": ["negative", "positive"][best], "score": float(scores[best])}
