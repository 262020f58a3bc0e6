"What tests against PaddleOCR's own numbers share"
import numpy as np
from fastai.basics import Callback
from torch import nn, optim

LEAVES = dict(_mean='running_mean', _variance='running_var')

def ours(name):
    "PaddleOCR's name of a parameter or buffer -> the name in our state_dict"
    head,dot,leaf = name.rpartition('.')
    return f'{head}{dot}{LEAVES.get(leaf, leaf)}'

def part(m, key, value, kind='stored_part'):
    "The part of a result that a case keeps"
    where = m.get(kind, {})
    where = where.get(key) if isinstance(where, dict) else where
    return eval(f'value{where}') if where else value

def close(a, b, rel): np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=rel*max(np.abs(b).max(), 1e-9))

def learns(net, x, other, lr=1e-4):
    "Two steps towards other classes: every parameter of the head has a gradient, and the loss falls"
    opt,losses = optim.Adam(net.parameters(), lr),[]
    for _ in range(2):
        losses.append(nn.functional.cross_entropy(net.train()(x).flatten(0,1), other.flatten()))
        losses[-1].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.head.parameters())
        opt.step()
    assert losses[1]<losses[0]

class Same:
    "A loader that gives one batch again and again"
    n_inp = 1
    def __init__(self, batch, n): self.batch,self.n = batch,n
    def __len__(self): return self.n
    def __iter__(self): return iter([self.batch]*self.n)

class Watch(Callback):
    "Keeps the first outputs, what each step's loss was made of, the largest rate, and the first gradients' norms"
    def before_fit(self): self.rows,self.lrs,self.norms = [],[],None
    def after_loss(self):
        if not self.training: return
        if not self.rows: self.first = self.pred
        self.rows.append({k: float(v) for k,v in self.learn.loss_func.parts.items()} | dict(loss=float(self.loss)))
    def before_step(self):
        self.lrs.append(max(h['lr'] for h in self.opt.hypers))
        if self.norms is None: self.norms = {k: p.grad.double().norm().item() for k,p in self.model.named_parameters() if p.grad is not None}
