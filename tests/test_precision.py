"Mixed precision is for the networks: a loss computes in float32, also what it multiplies"
import pytest, torch
from fastai.basics import DataLoader, DataLoaders
from torch import nn
from torch.utils.data import TensorDataset
from distillbook.learner import distill_learner
from distillbook.precision import CPUBfloat16, GPUMixedPrecision
from distillbook.relations import sp
from distillbook.terms import Term

class AsOnAGPU(GPUMixedPrecision):
    "What it does on a GPU, on a CPU"
    def before_fit(self):
        super().before_fit()
        self.autocast,self.learn.scaler = torch.autocast('cpu', torch.bfloat16),torch.amp.GradScaler('cpu', enabled=False)

@pytest.mark.parametrize('callback', [AsOnAGPU, CPUBfloat16])
def test_losses_are_outside_of_autocast(callback):
    torch.manual_seed(0)
    ds,seen = TensorDataset(torch.randn(16, 8), torch.zeros(16, dtype=torch.long)),[]
    def net(n): return nn.Sequential(nn.Linear(8, n), nn.Linear(n, 5))
    def look(student, teacher):
        seen.append((torch.is_autocast_enabled('cpu'), student.dtype, sp(student, teacher).dtype))
        return sp(student, teacher)
    learn = distill_learner(DataLoaders(DataLoader(ds, bs=8), DataLoader(ds, bs=8)), dict(Teacher=net(16), Student=net(6)), [Term(look, 'Student.0', 'Teacher.0')], frozen=['Teacher'])
    learn.model(ds[:8][0])
    seen.clear()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=callback())
    assert len(seen)>=4 and set(seen)=={(False, torch.float32, torch.float32)}
    assert not torch.is_autocast_enabled('cpu')
