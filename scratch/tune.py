import sys, os, time, torch, statistics
sys.path.insert(0, os.getcwd())
flags = sys.argv[2].split() if len(sys.argv) > 2 else []
from sat_lib import extension, ops
from sat_lib.pattern import random_layout
extension.CUDA_FLAGS += flags
if sys.argv[1] == "build":
    t=time.time(); extension.load(); print("build", flags, round(time.time()-t), "s"); sys.exit()
dev=torch.device("cuda"); flush=torch.empty(256*2**20,dtype=torch.int8,device=dev)
def timeit(f, n=20):
    for _ in range(3): f()
    ts=[]
    for _ in range(n):
        for _ in range(6): flush.zero_()
        a,b=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True)
        a.record(); f(); b.record(); b.synchronize(); ts.append(a.elapsed_time(b))
    return statistics.median(ts)
def case(dtype, batch=512, L=1024, d=32, block=32, density=.05, heads=2):
    torch.manual_seed(0)
    qkv=[torch.randn(batch,heads,L,d,device=dev,dtype=dtype,requires_grad=True) for _ in range(3)]
    n=-(-L//block); lay=random_layout(n,n,density,block,seed=0).to(dev)
    g=torch.randn_like(qkv[0])
    return qkv,lay,g
def fb(f,qkv,g):
    with torch.no_grad(): a=timeit(lambda: f(*qkv))
    b=timeit(lambda: torch.autograd.grad(f(*qkv),qkv,g))
    return f"{a:.4f} / {b:.4f}"
torch.backends.cuda.matmul.fp32_precision="tf32"
sat=lambda lay: (lambda q,k,v: ops.block_sparse_attention(q,k,v,lay))
sd=torch.nn.functional.scaled_dot_product_attention
print("== ", flags, flush=True)
for dt in (torch.bfloat16, torch.float32):
    qkv,lay,g=case(dt); print(dt,"main fwd / fwd+bwd", fb(sat(lay),qkv,g), flush=True)
qkv,lay,g=case(torch.bfloat16,density=.25); print("25% bf16", fb(sat(lay),qkv,g), flush=True)
if sys.argv[1]=="full":
    print("sdpa bf16", fb(sd,qkv,g))
    x=torch.empty(2**30,dtype=torch.int8,device=dev); y=torch.empty_like(x)
    t=timeit(lambda: y.copy_(x)); print("copy TB/s", 2*2**30/t/1e9)
    torch.backends.cuda.matmul.fp32_precision="ieee"
    qkv,lay,g=case(torch.float32); print("fp32 ieee main", fb(sat(lay),qkv,g)); torch.backends.cuda.matmul.fp32_precision="tf32"
    for dens in (.05,.5,1.0):
        qkv,lay,g=case(torch.bfloat16,density=dens); print("bf16 density",dens, fb(sat(lay),qkv,g))
    for L,d,block in ((16384,64,64),(16384,128,128),(16384,32,32),(4096,64,32)):
        qkv,lay,g=case(torch.bfloat16,batch=max(1,128*1024//L),L=L,d=d,block=block); print("L",L,"d",d,"block",block, fb(sat(lay),qkv,g),"sdpa",fb(sd,qkv,g), flush=True)
    for d,block in ((64,32),(128,32),(32,16),(32,64),(32,128)):
        qkv,lay,g=case(torch.bfloat16,d=d,block=block); print("main d",d,"block",block, fb(sat(lay),qkv,g), flush=True)
    for dt in (torch.bfloat16, torch.float32):
        (q,k,v),lay,g=case(dt)
        with torch.no_grad():
            val=ops.sddmm(q,k,lay); w=ops.sparse_softmax(val,lay,2,1024)
            floor=lambda b: b/3.0e9
            one,kept=q.nbytes,val.nbytes
            print(dt,"sddmm",timeit(lambda: ops.sddmm(q,k,lay)),"floor",floor(2*one+kept),"softmax",timeit(lambda: ops.sparse_softmax(val,lay,2,1024)),"floor",floor(2*kept),"spmm",timeit(lambda: ops.spmm(w,v,lay,1024)),"floor",floor(2*one+kept), "spmmT", timeit(lambda: torch.ops.sat_lib.spmm_transposed(w,v,ops._lists(lay),None,32,1024,1.0)), "softmax bwd", timeit(lambda: torch.ops.sat_lib.sparse_softmax_backward(val,w,ops._lists(lay),32,2,1024)),"floor",floor(3*kept), flush=True)
            print(dt,"statistics",timeit(lambda: ops.attention_statistics(q,k,32)), flush=True)
    (q,k,v),lay,g=case(torch.bfloat16)
    from torch.profiler import profile, ProfilerActivity
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(5):
            ops.attention_statistics(q,k,32)
    print(p.key_averages().table(sort_by="cuda_time_total",row_limit=6,max_name_column_width=60)[:3000])
