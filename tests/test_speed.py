"What the benchmarks count: parts of a step, ratios, and that what they compare computes the same"
import json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from torch import nn
from benchmarks import speed
from distillbook.rec.backbone import MobileNetV1Enhance
from distillbook.rec.losses import ctc_loss

def test_split():
    "Between callbacks is work, inside them is what they cost"
    notes,t = [],0.
    for work,event,cbs in ((1,'before_batch',.1), (5,'after_pred',.2), (2,'after_loss',.1), (0,'before_backward',.1), (7,'after_backward',.1), (0,'before_step',.1), (3,'after_step',.1), (.5,'after_batch',.2))*2:
        notes += [(event,-1000,t := t+work), (event,1000,t := t+cbs)]
    got = speed.split(notes, 2)
    assert got==pytest.approx(dict(data=.5, forward=5, losses=2, backward=7, optimizer=3, callbacks=1., rest=.5))

def test_ratios():
    rows = list(speed.ratios(dict(a=[1.,2.,4.], b=[2.,2.,2.]), 'a'))
    assert rows[1]==dict(what='b', ms=2000., ratio=1., lowest=.5, highest=2.)

def test_sparse_ctc():
    "Repeated characters, empty labels and labels too long for the line included"
    torch.manual_seed(0)
    x = torch.randn(6,12,40,requires_grad=True)
    y,l = torch.randint(1, 40, (6,10)),torch.tensor([0,1,5,6,10,10])
    y[2],y[5] = 7,7
    y[torch.arange(10)>=l[:,None]] = 0
    a,b = ctc_loss(x, y, l),speed.sparse_ctc(x, y, l)
    ga,gb = [torch.autograd.grad(o, x)[0] for o in (a, b)]
    assert a.item()==pytest.approx(b.item(), rel=1e-5) and torch.allclose(ga, gb, atol=1e-5)

def test_doubled():
    "Twins in groups compute what the two compute"
    torch.manual_seed(0)
    a,b,both = MobileNetV1Enhance(scale=.25).eval(),MobileNetV1Enhance(scale=.25).eval(),speed.doubled(MobileNetV1Enhance(scale=.25)).eval()
    state = both.state_dict()
    for k,v in state.items():
        if v.ndim: v.copy_(torch.cat([a.state_dict()[k], b.state_dict()[k]]))
    x = torch.randn(2,3,48,64)
    with torch.no_grad(): assert torch.allclose(both(torch.cat([x,x], 1)), torch.cat([a(x), b(x)], 1), atol=1e-5)

def test_command(tmp_path):
    "One suite, as a user runs it"
    r = subprocess.run([sys.executable, '-m', 'benchmarks', 'ctc', '--rounds', '1', '--threads', '1', '--json', str(tmp_path/'o.json')], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert r.returncode==0 and 'those in the label' in r.stdout, r.stderr
    found = json.loads((tmp_path/'o.json').read_text())
    assert found['threads']==1 and found['machine']['cores']>=1 and len(found['ctc'])==4 and all(o['ms']>0 for o in found['ctc'])
    r = subprocess.run([sys.executable, '-m', 'benchmarks', 'stpes'], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert r.returncode==2 and "no suite 'stpes'" in r.stderr

def test_waiting(monkeypatch):
    "Settings reach the processes; the best of a condition has the ratio 1"
    from benchmarks import waiting
    monkeypatch.setenv('OMP_WAIT_POLICY', 'active')
    got = {}
    def run(cmd, env, **_):
        got[cmd[-1]] = env
        return subprocess.CompletedProcess(cmd, 0, '[0.5, 1.0]')
    monkeypatch.setattr(waiting.subprocess, 'run', run)
    took = waiting.one_process('spin 1000', 2, 7)
    assert took==[.5,1.] and got['7']['GOMP_SPINCOUNT']=='1000' and got['7']['OMP_NUM_THREADS']=='2' and 'OMP_WAIT_POLICY' not in got['7']
    a,b = waiting.rows('quiet', dict(unset=[2.,3.,4.], passive=[1.,1.5,2.]))
    assert (a['ms'],a['ratio'],b['ratio'])==(3000.,2.,1.)

def test_results():
    "What the chapters read is there, in the form in which the benchmarks write it, and says where it comes from"
    results = Path(__file__).parents[1]/'benchmarks'/'results'
    for path in results.glob('*.json'):
        o = json.loads(path.read_text())
        assert 'machine' in o, path.name
        assert 'command' in o or path.stem.startswith('paddleocr'), path.name
    for name in ('five_losses','five_ways','four_detectors','ppocrv4_lines'): assert (results/f'{name}.png').exists()

def test_summary_of_detectors():
    "Gains are over the same student alone"
    from benchmarks.four_detectors import summary_of
    def row(way, net, hmean): return dict(way=way, seed=0, net=net, set='held out', hmean=hmean, precision=.5, recall=.5)
    rows = [row('alone','Student',.5), row('alone','Student2',.7), row('DML','Student',.6), row('DML','Student2',.6)]
    rows += [dict(r, set='unseen font') for r in rows]
    got = {(o['way'],o['set']): o for o in summary_of(rows)}
    assert got['DML','held out']['gain']==dict(mean=0., lowest=-.1, highest=.1)
    assert got['alone','held out']['gain'] is None and got['alone','held out']['hmean']['mean']==.6

def test_gpu_without_one(tmp_path):
    "`benchmarks.gpu` from end to end on tiny networks: rows are measured, what fails is recorded, and the others go on"
    jobs = 'rec fp16','rec bf16','learner rec bf16','files rec bf16','twins bf16'
    out = tmp_path/'gpu.json'
    r = subprocess.run([sys.executable, '-m', 'benchmarks.gpu', '--device', 'cpu', '--small', '--json', str(out), '--seconds', '400', '--jobs', *jobs], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    rows = {k: v['rows'] for k,v in json.loads(out.read_text())['jobs'].items()}
    assert set(rows)==set(jobs)
    assert all('LSTM' in o['error'] for o in rows['rec fp16']) # No float16 for LSTMs on a CPU
    assert [o['way'] for o in rows['rec bf16']]==['plain','recorded','recorded, a stream each'] and all(o['ms']>0 and 'error' not in o and 'fell_back' not in o for o in rows['rec bf16'])
    assert [o['ratio']>0 and 'fell_back' not in o for o in rows['twins bf16']]==[True]*4
    assert rows['learner rec bf16'][0]['ratio']>0 and rows['files rec bf16'][0]['samples_s']>0

def test_triton_depthwise():
    "The candidate's three kernels compute what PyTorch does, in Triton's interpreter: both layouts, strides, odd sizes"
    pytest.importorskip('triton')
    code = "from benchmarks.depthwise import check; print(max(check('cpu', cases=[(1,3,3,4,(3,3),(1,1)), (1,3,4,5,(5,5),(2,1))]), check('cpu', cases=[(1,3,3,4,(1,3),(1,2))])))"
    r = subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parents[1], env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True)
    assert r.returncode==0 and float(r.stdout)<1e-5, r.stderr

def test_gpu_jobs_that_break(monkeypatch):
    "A process that ends or hangs costs the job at which it was, and no other"
    from types import SimpleNamespace
    from benchmarks import gpu
    begun = []
    class Fake:
        def __init__(self, names, o): self.names,self.late,self.process = list(names),None,SimpleNamespace(kill=lambda: None, wait=lambda: None, returncode=-11)
        def line(self, seconds):
            if not self.names: return None
            name = self.names[0]
            if begun[-1:]!=[name]:
                begun.append(name)
                return dict(begun=name)
            if name=='cml bf16': return None
            self.names.pop(0)
            return dict(done=name, rows=[dict(ms=1)], seconds=1)
    monkeypatch.setattr(gpu, 'Watched', Fake)
    found = dict(jobs={})
    gpu.all_jobs(['rec bf16','cml bf16','rec fp32'], SimpleNamespace(seconds=60), found, lambda: None)
    assert {k: list(v['rows'][0]) for k,v in found['jobs'].items()}=={'rec bf16': ['ms'], 'cml bf16': ['error'], 'rec fp32': ['ms']}
    assert 'ended with -11' in found['jobs']['cml bf16']['rows'][0]['error']

def test_union():
    from benchmarks.gpu import union
    assert union([(0,2),(1,3),(5,6),(5,9)])==7
