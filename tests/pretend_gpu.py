"""A GPU for machines without one: tensors that say they are on cuda:0, compute on the CPU, and refuse to be mixed with tensors that are not

    with pretend_gpu():
        net.to('cuda')
        net(torch.randn(4,3,8,8))                     # RuntimeError, as on a GPU
        net(torch.randn(4,3,8,8).to('cuda')).numpy()  # TypeError, as on a GPU

Whatever Python asks of PyTorch passes `__torch_function__`. There a tensor on the pretended GPU (`OnGPU`) looks at its company; its numbers are those of an ordinary CPU tensor, so that a whole operation (a layer,
an LSTM, CTC, a loss, all of `backward`) runs in one piece and as quickly as ever. A mode sees to what has no such tensor in it: `x.to('cuda')`, `torch.zeros(3, device='cuda')`. `torch.cuda` answers as on a machine with one card,
and `autocast('cuda')` casts as the CPU's does. It cannot show what happens inside PyTorch: streams, graphs, kernels, memory; nor that a GPU has random numbers of its own."""
import contextlib, types
from unittest.mock import patch
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

CUDA,NAME = torch.device('cuda', 0),'Pretend GPU'
MIXED = 'Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!'
NO_NUMPY = "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
T = torch.Tensor

AS_SUBCLASS = T.as_subclass

def plain(x):
    "The numbers of a tensor"
    with torch._C.DisableTorchFunction(): return AS_SUBCLASS(x, T) if isinstance(x, OnGPU) else x

def on_gpu(x):
    "A new tensor, or those in a tuple or list, on the pretended GPU"
    if isinstance(x, T):
        if isinstance(x, nn.Parameter): x._is_param = True
        x.__class__ = OnGPU
        return x
    return type(x)(map(on_gpu, x)) if isinstance(x, (tuple,list)) else x

def is_gpu(device): return (device.type if isinstance(device, torch.device) else str(device)).partition(':')[0]=='cuda'

def tensors(o):
    "All tensors in nested arguments"
    if isinstance(o, T): yield o
    elif isinstance(o, (tuple,list)):
        for v in o: yield from tensors(v)
    elif isinstance(o, dict): yield from tensors(list(o.values()))

ANYWHERE = {T.copy_, T.view_as, T.expand_as, T.reshape_as, torch.is_same_size, torch.ctc_loss, nn.functional.ctc_loss} # Lengths may be on the CPU
STRICT = {torch.stack, torch.cat, torch.lerp, T.lerp, T.lerp_, torch.addcmul, T.addcmul, T.addcmul_, torch.addcdiv, T.addcdiv, T.addcdiv_} # Here a CPU tensor that is one number is not a number

def check(func, args, kwargs):
    "`RuntimeError` if tensors of both places are in a call"
    if func in ANYWHERE: return
    if func is T.__getitem__ and isinstance(args[0], OnGPU): return
    if func is T.__setitem__:
        indexed = any(t.ndim for t in tensors(args[1]))
        args = (args[0], args[1], args[2] if indexed else None) if not isinstance(args[0], OnGPU) else (args[0], args[2] if indexed else None)
    found = list(tensors([args, kwargs]))
    cpu = [t for t in found if not isinstance(t, OnGPU)]
    gpu = [t for t in found if isinstance(t, OnGPU)]
    if func is T.__getitem__: gpu = [t for t in gpu if t.ndim] # A number as an index
    if gpu and (cpu if func in STRICT else any(t.ndim for t in cpu)): raise RuntimeError(f"{MIXED} ({getattr(func, '__name__', func)})")

class OnGPU(T):
    "A tensor on the pretended GPU"
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        check(func, args, kwargs)
        with torch._C.DisableTorchFunction(): res = func(*args, **kwargs)
        if func in ANYWHERE and not isinstance(args[0], OnGPU): return res
        return on_gpu(res)

    @property
    def device(self): return CUDA if torch._C._is_torch_function_enabled() else torch.device('cpu') # Inside a whole operation: where its numbers are
    @property
    def is_cuda(self): return self.device.type=='cuda'
    @property
    def is_cpu(self): return not self.is_cuda
    def get_device(self): return 0
    def as_subclass(self, cls): return self # fastai's classes are not kept
    def numpy(self, *args, **kwargs): raise TypeError(NO_NUMPY)
    def __array__(self, *args, **kwargs): raise TypeError(NO_NUMPY)
    def __deepcopy__(self, memo):
        if id(self) not in memo:
            if not self.is_leaf: raise RuntimeError("Only Tensors created explicitly by the user (graph leaves) support the deepcopy protocol")
            new = on_gpu(plain(self.detach()).clone()).requires_grad_(self.requires_grad)
            if self.grad is not None: new.grad = on_gpu(plain(self.grad).clone())
            new.__dict__.update(self.__dict__)
            memo[id(self)] = new
        return memo[id(self)]
    def __reduce_ex__(self, protocol):
        "In a file it is as any other tensor"
        x = plain(self.detach())
        return (nn.Parameter(x, self.requires_grad) if getattr(self, '_is_param', False) else x).__reduce_ex__(protocol)

# ---- to and from the GPU

def to(x, *args, **kwargs):
    "`Tensor.to`"
    device,more = kwargs.pop('device', None),[]
    for i,a in enumerate(args):
        if isinstance(a, T): device,more = a.device,[*more, a.dtype]
        elif isinstance(a, (str,torch.device)) or (a is None or type(a) is int) and not i: device = a
        else: more.append(a)
    if type(device) is int: device = CUDA
    there,here = isinstance(x, OnGPU) if device is None else is_gpu(device),isinstance(x, OnGPU)
    old = plain(x) if here else x
    new = old.to('cpu' if device is None or there else device, *more, **kwargs)
    if there==here and new is old: return x
    if there!=here and new is old: new = old.clone()
    return on_gpu(new) if there else new

def pin_memory(x, *args, **kwargs):
    if isinstance(x, OnGPU): raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    return x

MOVES = {T.to: to, T.cuda: lambda x,*args,**kwargs: to(x, CUDA), T.cpu: lambda x,**kwargs: to(x, 'cpu'), T.type_as: lambda x,o: to(x, o)}

class Machine(TorchFunctionMode):
    "Moves, and tensors that are made on the GPU"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in MOVES: return MOVES[func](*args, **kwargs)
        if func is torch._C._nn._parse_to and args and isinstance(args[0], OnGPU): return torch.device(CUDA),args[0].dtype,False,None # `Module.to(tensor)`
        device = kwargs.get('device')
        if device is None or func is torch._C._nn._parse_to: return func(*args, **kwargs)
        if not is_gpu(device) and type(device) is not int: return self.off_gpu(func(*args, **kwargs))
        if kwargs.get('generator') is not None: raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        learns = kwargs.pop('requires_grad', False)
        res = on_gpu(func(*args, **{**kwargs, 'device': 'cpu'}))
        return res.requires_grad_() if learns else res

    def off_gpu(self, x): return to(x, 'cpu') if isinstance(x, OnGPU) else x

def _apply(self, fn, recurse=True):
    "`nn.Module._apply`, which may change the class of a parameter"
    for m in self.children() if recurse else (): m._apply(fn)
    for name,p in self._parameters.items():
        if p is None: continue
        with torch.no_grad(): new,grad = fn(p),None if p.grad is None else fn(p.grad)
        if new.is_meta: self._parameters[name] = nn.Parameter(new, p.requires_grad)
        elif new is not p: _relocate(p, new, grad)
    for name,b in self._buffers.items():
        if b is not None: self._buffers[name] = fn(b)
    return self

def _relocate(p, new, grad):
    with torch._C.DisableTorchFunction():
        p.grad = None
        p.data = plain(new).detach()
        p.__class__ = OnGPU if isinstance(new, OnGPU) else nn.Parameter
        if isinstance(new, OnGPU): p._is_param = True
        p.grad = grad

# ---- what else says that there is a GPU

def _load(load):
    def loaded(*args, map_location=None, **kwargs):
        gpu = isinstance(map_location, (str,torch.device)) and is_gpu(map_location)
        res = load(*args, map_location='cpu' if gpu else map_location, **kwargs)
        return torch.utils._pytree.tree_map_only(T, on_gpu, res) if gpu else res
    return loaded

def _autocast(init):
    "That of the CPU, which has no LSTM in float16"
    def on_the_cpu(self, device_type, dtype=None, *args, **kwargs):
        if device_type=='cuda': device_type,dtype = 'cpu',torch.bfloat16
        init(self, device_type, dtype, *args, **kwargs)
    return on_the_cpu

class Stream:
    "A queue of operations: here each is done at once"
    def __init__(self, *args, **kwargs): pass
    def is_capturing(self): return False
    def query(self): return True
    def elapsed_time(self, end): return 0.
    def wait_stream(self, other=None): pass
    record = wait = synchronize = record_event = wait_event = wait_stream

def no_graph(*args, **kwargs): raise RuntimeError('a pretended GPU records no graphs')

PROPERTIES = types.SimpleNamespace(name=NAME, total_memory=80*2**30, major=9, minor=0, multi_processor_count=132)
ANSWERS = dict(is_available=True, device_count=1, current_device=0, is_bf16_supported=True, get_device_name=NAME, get_device_properties=PROPERTIES, get_device_capability=(9,0), mem_get_info=(70*2**30,80*2**30),
    memory_allocated=0, max_memory_allocated=0, memory_reserved=0, max_memory_reserved=0, is_current_stream_capturing=False, _is_in_bad_fork=False, get_sync_debug_mode=0, current_stream=Stream(), default_stream=Stream(), stream=contextlib.nullcontext(), **dict.fromkeys('_lazy_init init set_device synchronize empty_cache reset_peak_memory_stats manual_seed manual_seed_all set_rng_state set_rng_state_all set_sync_debug_mode'.split()))

def _always(value): return lambda *args, **kwargs: value

@contextlib.contextmanager
def pretend_gpu():
    "A machine with one GPU"
    with contextlib.ExitStack() as stack:
        def change(where, name, value):
            if hasattr(where, name): stack.enter_context(patch.object(where, name, value))
        for name,value in ANSWERS.items(): change(torch.cuda, name, _always(value))
        change(torch.cuda, 'get_rng_state', lambda *args: torch.zeros(16, dtype=torch.uint8))
        change(torch.cuda, 'get_rng_state_all', lambda: [torch.zeros(16, dtype=torch.uint8)])
        for name,value in dict(Stream=Stream, Event=Stream, CUDAGraph=no_graph).items(): change(torch.cuda, name, value)
        change(T, 'record_stream', _always(None))
        change(torch.backends.cudnn, 'is_acceptable', _always(False))
        for name,value in dict(current_device_index=0, set_device_index=None, synchronize=None, current_stream=Stream()).items(): change(getattr(torch, 'accelerator', None), name, _always(value))
        change(torch.amp.autocast_mode.autocast, '__init__', _autocast(torch.amp.autocast_mode.autocast.__init__))
        change(T, 'as_subclass', lambda x,cls: x if cls is OnGPU else AS_SUBCLASS(x, cls)) # fastai gives a result the class of what it was made of, here a place
        change(T, 'pin_memory', pin_memory) # Also in a loader's thread, where there is no mode
        change(torch, 'load', _load(torch.load))
        change(nn.Module, '_apply', _apply)
        stack.enter_context(Machine())
        yield
