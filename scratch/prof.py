import sys, os, torch
sys.path.insert(0, os.getcwd())
from sat_lib import ops
from sat_lib.pattern import random_layout
torch.backends.cuda.matmul.fp32_precision="tf32"
for dt in (torch.bfloat16,torch.float32):
    q,k,v=[torch.randn(512,2,1024,32,device="cuda",dtype=dt,requires_grad=True) for _ in range(3)]
    lay=random_layout(32,32,.05,32,seed=0).to("cuda")
    ops.block_sparse_attention(q,k,v,lay).backward(torch.randn_like(q))
    if dt==torch.bfloat16: ops.attention_statistics(q,k,32)
torch.cuda.synchronize()
