"The README's Python runs as it stands, given data and networks."
import copy, re
from pathlib import Path
import torch
from fastai.basics import DataLoader, DataLoaders, set_seed
from torch import nn
from torch.utils.data import TensorDataset


def test_readme_python():
    code = re.search(r'```python\n(.*?)```', Path('README.md').read_text(), re.S)[1]
    set_seed(0)
    x = torch.randn(256, 2)
    ds = TensorDataset(x, (x[:, 0]*x[:, 1] > 0).long())
    net = nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
    names = dict(dls=DataLoaders(DataLoader(ds, bs=32, shuffle=True), DataLoader(ds, bs=256)), teacher=net, student=copy.deepcopy(net), student2=copy.deepcopy(net))
    before = copy.deepcopy(net.state_dict())
    exec(code, names)
    assert names['student'] is not names['teacher'] and all(torch.equal(v, before[k]) for k, v in names['teacher'].state_dict().items())
    assert 'Student_accuracy' in names['learn'].table()
