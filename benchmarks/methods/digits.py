"scikit-learn's digits, 8 by 8 pixels"
from functools import cache
import torch
from sklearn.datasets import load_digits
from benchmarks.methods.classifier import Classifier

DOC = """scikit-learn's digits, 8 by 8 pixels: 1,000 to learn from, 200 to choose by, 597 to measure on.

A teacher of 58,474 weights saw the labels of all 1,000, students of 1,228 weights have those of 200 (`--labels`); where a loss wants a label and
there is none, it gets the teacher's."""

@cache
def digits():
    "Pictures and labels, in the order of the file"
    found = load_digits()
    return torch.tensor(found.images/16, dtype=torch.float32)[:,None],torch.tensor(found.target)

problem = Classifier(DOC, digits, learn=1000, choose=200, labels=200, epochs=[12, 36], big=(32,64,64), small=(6,12), strides=((1,2,1), (2,1)), sides=(4,4))
