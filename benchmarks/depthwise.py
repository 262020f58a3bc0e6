"""Depthwise convolutions on a GPU by three kernels of Triton: a candidate, which `benchmarks.gpu` measures beside cuDNN's. Not part of the library until a card has said that it pays.

Maps may lie in memory in any order; channels last is what they are made for. Sums are in float32 and in a fixed order, so that two runs give the same gradients.
`python -m benchmarks.depthwise` compares them with PyTorch's on whatever is there: on a GPU, or without one with TRITON_INTERPRET=1."""
from contextlib import contextmanager
import torch, triton, triton.language as tl
from torch import nn
from torch.autograd.function import once_differentiable


@triton.jit
def _slide(x, w, y, C, H, W, HO, WO, xn, xc, xh, xw, yn, yc, yh, yw, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BACK: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr):
    "Part of a row of y [N,C,HO,WO]: the convolution of x [N,C,H,W], or (BACK) the gradient of its input, x being that of its output"
    row = tl.program_id(0)
    n,h = (row//HO).to(tl.int64),row%HO
    cols,chan = tl.program_id(1)*BW+tl.arange(0, BW),tl.program_id(2)*BC+tl.arange(0, BC)
    there = chan<C
    total = tl.zeros((BW,BC), tl.float32)
    for i in tl.static_range(KH):
        if BACK:
            a = h+PH-i
            hi = a//SH
            ok_h = (a>=0) & (a%SH==0) & (hi<H)
        else:
            hi = h*SH-PH+i
            ok_h = (hi>=0) & (hi<H)
        for j in tl.static_range(KW):
            if BACK:
                b = cols+PW-j
                wi = b//SW
                ok = (b>=0) & (b%SW==0) & (wi<W) & ok_h
            else:
                wi = cols*SW-PW+j
                ok = (wi>=0) & (wi<W) & ok_h
            v = tl.load(x+n*xn+hi*xh+wi[:,None]*xw+chan[None,:]*xc, mask=ok[:,None] & there[None,:], other=0.)
            k = tl.load(w+chan*(KH*KW)+(i*KW+j), mask=there, other=0.)
            total += v.to(tl.float32)*k.to(tl.float32)[None,:]
    tl.store(y+n*yn+h*yh+cols[:,None]*yw+chan[None,:]*yc, total.to(y.dtype.element_ty), mask=(cols<WO)[:,None] & there[None,:])


@triton.jit
def _seen(x, base, chan, there, cols, ok_h, W, WO, xc, xw, SW: tl.constexpr, PW: tl.constexpr, J: tl.constexpr):
    "What the column J of the kernel meets"
    wi = cols*SW-PW+J
    ok = (wi>=0) & (wi<W) & (cols<WO) & ok_h
    return tl.load(x+base+wi[:,None]*xw+chan[None,:]*xc, mask=ok[:,None] & there[None,:], other=0.).to(tl.float32)


@triton.jit
def _weight(x, g, part, ROWS, PER, C, H, W, HO, WO, xn, xc, xh, xw, gn, gc, gh, gw, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BW: tl.constexpr, BC: tl.constexpr):
    "One row of the kernel's gradient over some rows of the maps: part [chunks,KH,KW,C]"
    i,chunk = tl.program_id(0)%KH,tl.program_id(0)//KH
    chan = tl.program_id(1)*BC+tl.arange(0, BC)
    there = chan<C
    a0 = tl.zeros((BW,BC), tl.float32)
    a1 = tl.zeros((BW,BC), tl.float32)
    a2 = tl.zeros((BW,BC), tl.float32)
    a3 = tl.zeros((BW,BC), tl.float32)
    a4 = tl.zeros((BW,BC), tl.float32)
    for r in range(chunk*PER, tl.minimum((chunk+1)*PER, ROWS)):
        n,h = (r//HO).to(tl.int64),r%HO
        hi = h*SH-PH+i
        ok_h = (hi>=0) & (hi<H)
        base = n*xn+hi*xh
        for first in range(0, WO, BW):
            cols = first+tl.arange(0, BW)
            gv = tl.load(g+n*gn+h*gh+cols[:,None]*gw+chan[None,:]*gc, mask=((cols<WO) & ok_h)[:,None] & there[None,:], other=0.).to(tl.float32)
            a0 += gv*_seen(x, base, chan, there, cols, ok_h, W, WO, xc, xw, SW, PW, 0)
            if KW>1: a1 += gv*_seen(x, base, chan, there, cols, ok_h, W, WO, xc, xw, SW, PW, 1)
            if KW>2: a2 += gv*_seen(x, base, chan, there, cols, ok_h, W, WO, xc, xw, SW, PW, 2)
            if KW>3: a3 += gv*_seen(x, base, chan, there, cols, ok_h, W, WO, xc, xw, SW, PW, 3)
            if KW>4: a4 += gv*_seen(x, base, chan, there, cols, ok_h, W, WO, xc, xw, SW, PW, 4)
    to = part+((chunk*KH+i)*KW)*C+chan
    tl.store(to, tl.sum(a0, 0), mask=there)
    if KW>1: tl.store(to+C, tl.sum(a1, 0), mask=there)
    if KW>2: tl.store(to+2*C, tl.sum(a2, 0), mask=there)
    if KW>3: tl.store(to+3*C, tl.sum(a3, 0), mask=there)
    if KW>4: tl.store(to+4*C, tl.sum(a4, 0), mask=there)


def tile(x, width):
    "Columns and channels of a program: along whichever lies together in memory"
    c = triton.next_power_of_2(x.shape[1])
    if x.stride(1)==1: return min(max(1, 1024//min(c, 64)), triton.next_power_of_2(width), 32),min(c, 64)
    return min(128, triton.next_power_of_2(width)),min(c, 4)


def slide(x, w, size, kernel, stride, padding, back):
    y = torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last if x.stride(1)==1 else torch.contiguous_format)
    (n,c,h,wd),(ho,wo),(bw,bc) = x.shape,size,tile(x, size[1])
    grid = n*ho,triton.cdiv(wo, bw),triton.cdiv(c, bc)
    _slide[grid](x, w, y, c, h, wd, ho, wo, *x.stride(), *y.stride(), *kernel, *stride, *padding, back, bw, bc)
    return y


def weight_grad(x, g, kernel, stride, padding, programs=1056):
    (n,c,h,w),(_,_,ho,wo),(bw,bc) = x.shape,g.shape,tile(x, g.shape[3])
    blocks,rows = triton.cdiv(c, bc),n*ho
    per = triton.cdiv(rows, max(1, min(rows, programs//(blocks*kernel[0]))))
    chunks = triton.cdiv(rows, per)
    part = torch.empty((chunks, *kernel, c), dtype=torch.float32, device=x.device)
    _weight[(chunks*kernel[0],blocks)](x, g, part, rows, per, c, h, w, ho, wo, *x.stride(), *g.stride(), *kernel, *stride, *padding, bw, bc)
    return part.sum(0).permute(2,0,1)[:,None]


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride,ctx.padding = stride,padding
        kernel = tuple(weight.shape[2:])
        size = [(n+2*p-k)//s+1 for n,p,k,s in zip(x.shape[2:], padding, kernel, stride)]
        return slide(x, weight.reshape(len(weight), -1).contiguous(), size, kernel, stride, padding, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,weight),kernel = ctx.saved_tensors,tuple(ctx.saved_tensors[1].shape[2:])
        dx = slide(g, weight.reshape(len(weight), -1).contiguous(), x.shape[2:], kernel, ctx.stride, ctx.padding, True) if ctx.needs_input_grad[0] else None
        dw = weight_grad(x, g, kernel, ctx.stride, ctx.padding).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx,dw,None,None


class TritonDepthwise(nn.Conv2d):
    "A depthwise convolution by Triton; what autocast rounds is the map, not the kernel"
    def forward(self, x):
        kind = x.device.type
        if torch.is_autocast_enabled(kind): x = x.to(torch.get_autocast_dtype(kind))
        y = _Conv.apply(x, self.weight, self.stride, self.padding)
        return y if self.bias is None else y+self.bias[:,None,None]


def fits(m):
    if type(m) is not nn.Conv2d or not m.groups==m.in_channels==m.out_channels or m.groups==1 or m.padding_mode!='zeros': return False
    return m.dilation==(1,1) and not isinstance(m.padding, str) and m.kernel_size[1]<=5


@contextmanager
def triton_depthwise(net):
    "Inside the block the depthwise convolutions of a network are Triton's"
    layers = [m for m in net.modules() if fits(m)]
    for m in layers: m.__class__ = TritonDepthwise
    try: yield layers
    finally:
        for m in layers: m.__class__ = nn.Conv2d


CASES = [(2,8,7,10,(3,3),(1,1)), (2,8,7,10,(3,3),(2,1)), (1,20,6,9,(5,5),(1,1)), (2,6,8,9,(5,5),(2,2)), (2,5,3,8,(5,5),(1,2)), (1,4,5,6,(1,3),(1,1))]

def check(device, dtype=torch.float32, cases=CASES):
    "The largest relative difference from PyTorch of outputs and gradients, over cases and layouts"
    worst = 0.
    for n,c,h,w,kernel,stride in cases:
        for memory in (torch.channels_last, torch.contiguous_format):
            torch.manual_seed(0)
            x = torch.randn(n, c, h, w, device=device, dtype=dtype).to(memory_format=memory).requires_grad_()
            k = torch.randn(c, 1, *kernel, device=device).to(memory_format=memory).requires_grad_()
            padding = tuple(o//2 for o in kernel)
            ours = _Conv.apply(x, k, stride, padding)
            right = nn.functional.conv2d(x.float(), k, None, stride, padding, groups=c)
            g = torch.randn_like(right)
            pairs = [(ours, right), *zip(torch.autograd.grad(ours, (x, k), g.to(dtype)), torch.autograd.grad(right, (x, k), g))]
            worst = max(worst, *(((a.float()-b.float()).abs().max()/b.float().abs().max()).item() for a,b in pairs))
    return worst


if __name__=='__main__':
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    print('float32:', check(device), 'bfloat16:', check(device, torch.bfloat16, CASES if device=='cuda' else CASES[:2]))
