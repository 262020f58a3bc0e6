"""Which loss? Every method of distillation on one problem, with one budget, against a twin that has the labels only.

    python -m benchmarks.methods --problem digits|mnist|lines|pages [--labels 200] [--seeds 0 1 2 3 4] [--epochs 12 36] [--only kd rkd ...] [--out FOLDER]
    python -m benchmarks.methods --full --data FOLDER [--device cuda] [--minutes 10] ...

Problems: scikit-learn's digits and five thousand of MNIST's (a classifier), rendered lines with an unseen font (a CTC reader), rendered pages (a detector); what they are
stands in benchmarks/methods/digits.py, mnist.py, lines.py and pages.py. `--full` is CIFAR-10 or CIFAR-100 from files that you have, see cifar.py.

A teacher has seen all labels, students have a few of them. All students of a seed begin with the same weights and see the same batches; they are trained side by side
in one learner, where none touches another. A term's weight is that at which its first gradient is as long as that of the labels; with `--choose` .1, 1 or 10 times that, whichever
is best with two seeds that are not in the table, on examples that are kept for it. What a step costs is measured for each method by itself, in processor time of one thread.
Each seed's numbers are written when it ends, and a seed whose numbers are there is not run again. `methods_PROBLEM.json` holds all of them;
copied to `benchmarks/results`, it is what the chapter shows."""
import argparse, copy, importlib, json, sys, time
from pathlib import Path
import torch
from fastai.basics import set_seed
from benchmarks.methods.common import fit, kept, place
from benchmarks.gpu import machine_of
from distillbook.core import UserError, write_beside
from distillbook.nets import Nets, Targets
from distillbook.terms import Terms

FACTORS = (.1, 1., 10.)
TUNING_SEEDS = (100, 101)

class Table:
    "All methods on a problem, one of the modules beside this file"
    def __init__(self, problem, labels): self.problem,self.labels,self.device = problem,labels,getattr(problem, 'where', {}).get('device', 'cpu')

    def taught(self, method, name, weight):
        "The term of a method"
        t = self.problem.METHODS[method](name)
        t.name,t.named,t.weight,t.recipe = f'{method} {name}',True,weight,(t.recipe[0],weight)
        return t

    def asked(self, methods):
        "The teachers that methods want"
        p = self.problem
        if 'three_teachers' in methods: return {n: p.told(n) for n in p.TEACHERS}
        return {'Teacher': p.told('Teacher')} if set(methods)-p.NO_TEACHER else {}

    def one_student(self, method, weight):
        "Networks and terms of one student that learns from labels, and by a method if there is one"
        p,given = self.problem,self.asked([method]) if method else {}
        set_seed(99)
        nets = Nets({**given, 'S': p.student(method, p.first())}, frozen=list(given)).train().to(self.device)
        terms = Terms(nets, [p.lesson('S', method), *([self.taught(method, 'S', weight)] if method else [])])
        xb,yb = p.batch()
        terms.connect((xb, Targets(yb)) if nets.want_targets() else (xb,), yb)
        return nets,terms,(xb, Targets(yb)) if nets.want_targets() else (xb,),yb

    def first_gradients(self):
        "How long the first gradient of each method is on the student's layers, in units of that of the labels"
        res = {}
        for m in self.problem.METHODS:
            nets,terms,xb,yb = self.one_student(m, 1.)
            params,lengths = self.problem.layers(nets['S']),[]
            for t in terms.terms:
                ins,named = terms.inputs(t, nets(*xb), yb)
                grads = torch.autograd.grad(terms.value_of(t, terms.projected(t, ins), named, yb), params, allow_unused=True)
                lengths.append(sum(g.square().sum() for g in grads if g is not None).sqrt().item())
            res[m] = lengths[1]/lengths[0]
        return res

    def side_by_side(self, students, seed, epochs, dls=None, **kwargs):
        "{name: (method, weight)} trained in one learner; the networks"
        p,given = self.problem,self.asked([m for m,_ in students.values()])
        dls = dls or p.dls(seed, self.labels)
        set_seed(seed)
        first = p.first()
        nets = {n: copy.deepcopy(first) for n in ('Alone', *p.ALONE)} | {n: p.student(m, copy.deepcopy(first)) for n,(m,_) in students.items()}
        terms = [p.lesson('Alone'), *(make(n) for n,make in p.ALONE.items())]
        terms += [t for n,(m,w) in students.items() for t in (p.lesson(n, m), self.taught(m, n, w))]
        fit({**given, **nets}, terms, dls, epochs, list(given), **dict(lr=p.LR) | getattr(p, 'FIT', {}) | kwargs)
        return nets

    def chosen(self, methods, epochs, choose):
        "The weight of each method, by the rule or the best of three"
        unit = self.first_gradients()
        if not choose: return {m: dict(factor=1., weight=1/unit[m]) for m in methods}
        tries = {f'{m} {i}': (m, f/unit[m]) for m in methods for i,f in enumerate(FACTORS)}
        found = [self.side_by_side(tries, seed, epochs) for seed in TUNING_SEEDS]
        score = {n: sum(self.problem.score(nets[n], 'choose') for nets in found)/len(found) for n in tries}
        of = {m: {f: score[f'{m} {i}'] for i,f in enumerate(FACTORS)} for m in methods}
        best = {m: max(FACTORS, key=lambda f: (of[m][f], f==1)) for m in methods}
        return {m: dict(factor=best[m], weight=best[m]/unit[m], tried={f'{f:g}': round(v, 4) for f,v in of[m].items()}) for m in methods}

    def epochs_for(self, minutes, methods, seeds):
        "How many fit, see cifar.py"
        students = {m: (m, 1.) for m in methods}
        return self.problem.epochs_for(minutes, seeds, lambda dls, cbs: self.side_by_side(students, 0, 1, dls, lr=1e-6, cbs=cbs))

    def measured(self, weights, methods, seed, epochs):
        students = {m: (m, weights[m]['weight']) for m in methods}
        return {n: round(self.problem.score(net, 'test'), 4) for n,net in self.side_by_side(students, seed, epochs).items()}

    def step_times(self, methods, rounds=15):
        "Median processor seconds of a step of one student with labels and a method, its teacher asked; of labels alone under ''; in turns"
        steps,took = {m: self.one_step(m) for m in ('', *methods)},{}
        for _ in range(rounds):
            for m,step in steps.items():
                start = self.clock()
                step()
                took.setdefault(m, []).append(self.clock()-start)
        return {m: sorted(o)[rounds//2] for m,o in took.items()}

    def clock(self):
        "Processor time; on a GPU the time by the clock on the wall, when it has done what it was given"
        if self.device=='cpu': return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def one_step(self, method):
        nets,terms,xb,yb = self.one_student(method, 1.)
        opt = torch.optim.Adam([p for p in nets.parameters() if p.requires_grad], 1e-3)
        live = [self.problem.teacher(n) for n in nets.frozen if self.problem.told(n) is not self.problem.teacher(n)]
        def step():
            with torch.no_grad():
                for net in live: net(xb[0])
            opt.zero_grad()
            terms(nets(*xb), *yb).backward()
            opt.step()
        return step

def arguments():
    ap = argparse.ArgumentParser(prog='python -m benchmarks.methods', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--problem', choices=('digits','mnist','lines','pages'), default='digits')
    ap.add_argument('--full', action='store_true', help='CIFAR-10 or CIFAR-100 in place of a problem')
    ap.add_argument('--data', type=Path, help="Folder with CIFAR's own files, for --full")
    ap.add_argument('--device', default='cpu', help='cpu or cuda, for --full')
    ap.add_argument('--labels', type=int, help='Examples with a label; default: as the problem says')
    ap.add_argument('--choose', action='store_true', help='Choose each weight out of three (takes longer)')
    ap.add_argument('--seeds', type=int, nargs='+', default=[0,1,2,3,4])
    ap.add_argument('--epochs', type=int, nargs='+', help='One number, or several, each of which is measured; default: as the problem says')
    ap.add_argument('--only', nargs='+', metavar='METHOD', help='Not all methods')
    ap.add_argument('--minutes', type=float, default=10, help='For --full without --epochs: as many epochs as fit into this time; default: 10')
    ap.add_argument('--threads', type=int, default=1)
    ap.add_argument('--out', type=Path, help='Folder; default: runs/methods_PROBLEM')
    return ap

def main(args=None):
    ap = arguments()
    a = ap.parse_args(args)
    if a.full!=bool(a.data): ap.error("--full and --data FOLDER, where CIFAR's own files lie, belong together")
    if a.full and a.choose and not a.epochs: ap.error('--choose wants to know --epochs')
    if a.device!='cpu' and not torch.cuda.is_available(): ap.error(f'--device {a.device}: there is no GPU here')
    if a.full: a.problem = 'cifar'
    module = importlib.import_module(f'benchmarks.methods.{a.problem}')
    problem = getattr(module, 'problem', module)
    methods,a.epochs,a.labels = a.only or list(problem.METHODS),a.epochs or problem.EPOCHS,a.labels or problem.LABELS
    if bad := [m for m in methods if m not in problem.METHODS]: ap.error(f"no method {bad[0]!r}; there are {', '.join(problem.METHODS)}")
    if a.full: problem.where.update(data=a.data, device=a.device)
    torch.set_num_threads(a.threads)
    place['folder'] = out = a.out or Path(f'runs/methods_{a.problem}')
    out.mkdir(parents=True, exist_ok=True)
    table,about = Table(problem, a.labels),[methods, a.labels, a.choose]
    if a.full:
        same_source(out, [str(a.data.resolve()), a.device])
        a.epochs = a.epochs or [epochs_that_fit(table, methods, a, out)]
        problem.where['epochs'] = a.epochs[0]
        about += [a.epochs[0]] # The teacher's
    teacher = kept(out/'teacher.json', lambda: {n: round(problem.score(problem.teacher(n), 'test'), 4) for n in problem.TEACHERS}, a.epochs[0] if a.full else None)
    costs = kept(out/'costs.json', lambda: table.step_times(methods), methods)
    weights = kept(out/'weights.json', lambda: table.chosen(methods, a.epochs[0], a.choose), about)
    said = ['FOLDER' if o in (str(a.out), str(a.data)) else o for o in (sys.argv[1:] if args is None else args)]
    res = dict(command=' '.join(['python -m benchmarks.methods', *said]), machine=machine_of(a.device), problem=problem.__doc__, measured=problem.MEASURED)
    res |= dict(labels=a.labels or 'all', epochs=a.epochs, teacher=teacher['made'], costs=costs['made'], weights=weights['made'], runs={})
    if hasattr(problem, 'papers'): res['papers'] = problem.papers()
    res['cpu_seconds'] = {'teachers': teacher['cpu_seconds'], 'choosing weights': weights['cpu_seconds']}
    for epochs in a.epochs:
        for seed in a.seeds:
            got = kept(out/f'seed{seed}x{epochs}.json', lambda: table.measured(weights['made'], methods, seed, epochs), about)
            res['runs'].setdefault(f'{epochs}', {})[f'{seed}'] = got['made']
            res['cpu_seconds'][f'seed {seed}, {epochs} epochs'] = got['cpu_seconds']
            with write_beside(out/f'methods_{a.problem}.json') as tmp: tmp.write_text(json.dumps(res, indent=1))
            print(f"seed {seed}, {epochs} epochs, {got['cpu_seconds']:.0f} s:", {k: round(v-got['made']['Alone'], 3) for k,v in got['made'].items()}, flush=True)
    if 'papers' in res: print_beside(res)

def same_source(out, source):
    "`UserError` if what is kept in a folder was made of other files or elsewhere"
    was = kept(out/'source.json', lambda: source)['made']
    if was!=source: raise UserError(f"{out} holds what was made of {was[0]} on {was[1]}; --out names another folder")

def epochs_that_fit(table, methods, a, out):
    "Chosen once for a folder, and said"
    n = kept(out/'epochs.json', lambda: table.epochs_for(a.minutes, methods, len(a.seeds)), [a.minutes, methods, a.labels, len(a.seeds)])['made']
    print(f"{n} epoch{'s'*(n!=1)} fit into {a.minutes:g} minutes", flush=True)
    return n

def print_beside(res):
    "The mean of the seeds beside the papers' figure, per cent"
    runs = list(res['runs'][f"{res['epochs'][0]}"].values())
    ours = {m: 100*sum(r[m] for r in runs)/len(runs) for m in runs[0]}
    for m in sorted(ours, key=ours.get, reverse=True): print(f"{m:20} ours {ours[m]:6.2f}   paper {res['papers'].get(m, float('nan')):6.2f}")

if __name__=='__main__':
    try: main()
    except UserError as e: sys.exit(f'error: {e}')
