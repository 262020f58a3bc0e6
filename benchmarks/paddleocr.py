"""A training step of PaddleOCR itself beside ours, in turns: PP-OCRv3's rec distillation (batch 8) and det CML (batch 1, 320 x 320), the same shapes, random weights.

PaddleOCR is not part of this repository. Say where its source lies (release 2.6 to 2.10, its own licence) and which Python has PaddlePaddle and what PaddleOCR imports:

    python -m benchmarks.paddleocr --source PaddleOCR --python paddle/bin/python [--threads 2] [--rounds 5] [--json FILE]

It runs in a process of its own that waits while we compute, and we wait while it does. Its step is what tools/train.py does: forward, loss, backward, optimizer, the gradients cleared.
(On PaddlePaddle 3.3, two lines of release 2.6's rec_sar_head.py that take the minimum of an int32 and an int64 need a cast.)
"""
import argparse, json, os, subprocess, sys, time
from pathlib import Path
from statistics import median

THEIRS = '''
import os, sys, time, json, warnings
source,kind,path,bs = sys.argv[1:5]
warnings.simplefilter('ignore')
sys.path.insert(0, source)
out = os.fdopen(os.dup(1), 'w')
os.dup2(2, 1)
import numpy as np, paddle, yaml
from ppocr.losses import build_loss
from ppocr.modeling.architectures import build_model
from ppocr.optimizer import build_optimizer
paddle.set_device('cpu')
cfg = yaml.safe_load(open(path, encoding='utf-8'))
arch,bs = cfg['Architecture'],int(bs)
arch['model_type'] = kind
old = not hasattr(__import__('ppocr.modeling.backbones', fromlist=['x']), 'ResNet_vd')
for m in arch['Models'].values():
    m['pretrained'] = None
    if kind=='rec':
        m['Head']['out_channels_list'] = dict(CTCLabelDecode=6625, SARLabelDecode=6627)
        if old: m['algorithm'] = 'SVTR'
    if old and m.get('Backbone', {}).get('name')=='ResNet_vd': m['Backbone']['name'] = 'ResNet'
if kind=='rec': cfg['Loss']['loss_config_list'][-1]['DistillationSARLoss']['ignore_index'] = 6626
model,loss = build_model(arch),build_loss(cfg['Loss'])
opt,_ = build_optimizer(cfg['Optimizer'], epochs=10, step_each_epoch=100, model=model)
with np.load(sys.argv[5]) as z: batch = [paddle.to_tensor(z[f'arr_{i}']) for i in range(len(z.files))]
model.train()
for line in sys.stdin:
    start = time.perf_counter()
    preds = model(batch[0], data=batch[1:]) if kind=='rec' else model(batch[0])
    total = loss(preds, batch)['loss'].mean()
    total.backward()
    opt.step()
    opt.clear_grad()
    float(total)
    print(time.perf_counter()-start, file=out, flush=True)
'''


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--source', type=Path, required=True, help="PaddleOCR's folder")
    ap.add_argument('--configs', type=Path, help='Folder with ch_PP-OCRv3_rec_distillation.yml and ch_PP-OCRv3_det_cml.yml; default: where PaddleOCR has them')
    ap.add_argument('--python', required=True, help='A Python with PaddlePaddle')
    ap.add_argument('--threads', type=int, default=2)
    ap.add_argument('--rounds', type=int, default=5)
    ap.add_argument('--json', type=Path)
    a = ap.parse_args()
    os.environ['OMP_NUM_THREADS'] = str(a.threads)
    import tempfile, warnings
    import numpy as np, pandas as pd, torch
    from benchmarks.quickstart import machine
    from benchmarks.speed import bare, connected, ratios, work
    from distillbook.core import keep_memory, write_beside
    from distillbook.depthwise import Depthwise, wide_depthwise
    warnings.simplefilter('ignore')
    torch.set_num_threads(a.threads)
    keep_memory()
    rows = []
    for kind,task,name in (('rec','rec','ch_PP-OCRv3_rec_distillation.yml'), ('cml','det','ch_PP-OCRv3_det_cml.yml')):
        config = next((a.configs or a.source/'configs').rglob(name))
        _,nets,terms,xb,yb = work(kind)
        batch = Path(tempfile.mkdtemp())/'batch.npz'
        np.savez(batch, *[o.numpy() for o in (*xb, *yb)])
        theirs = subprocess.Popen([a.python, '-c', THEIRS, str(a.source), task, str(config), str(len(xb[0])), str(batch)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': str(a.threads)})
        def step_theirs():
            print('go', file=theirs.stdin, flush=True)
            return float(theirs.stdout.readline())
        nets.to(memory_format=torch.channels_last)
        connected(nets, terms, xb, yb)
        for m in wide_depthwise(nets): m.__class__ = Depthwise # As the learner does
        opt = torch.optim.Adam([p for p in nets.parameters() if p.requires_grad], lr=1e-3, fused=True)
        nets.train()
        bf16 = {'ours, teacher in bf16': set(nets.frozen)} if nets.frozen else {}
        took = {'PaddleOCR': [], 'ours': [], **{k: [] for k in bf16}}
        for r in range(a.rounds+2):
            turn = {'PaddleOCR': step_theirs()}
            for k,names in {'ours': set(), **bf16}.items():
                nets.bf16 = names
                turn[k] = sum(bare(nets, terms, xb, yb, opt))
            for k,v in turn.items(): took[k] += [v]*(r>1)
        theirs.stdin.close()
        theirs.wait()
        rows += [dict(config=kind, **row) for row in ratios(took, 'PaddleOCR')]
    found = dict(machine=machine(), threads=a.threads, rounds=a.rounds, rows=rows, paddle=subprocess.run([a.python, '-c', 'import paddle; print(paddle.__version__)'], capture_output=True, text=True).stdout.strip())
    print(pd.DataFrame(rows).to_string(index=False))
    if a.json:
        with write_beside(a.json) as tmp: tmp.write_text(json.dumps(found, indent=1))

if __name__=='__main__': main()
