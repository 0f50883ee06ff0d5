export PYTHONUNBUFFERED=1
nvidia-smi -L; nvcc --version | tail -1
V=("" "-DFWD_M=2 -DFWD_N=2 -DFWD_R=4 -DBWD_M=1 -DBWD_N=2 -DBWD_R=4" "-DFWD_M=1 -DFWD_N=4 -DFWD_R=5 -DBWD_M=1 -DBWD_N=4 -DBWD_R=3" "-DFWD_M=1 -DFWD_N=2 -DFWD_R=6 -DBWD_M=2 -DBWD_N=2 -DBWD_R=2" "-DFWD_M=2 -DFWD_N=4 -DFWD_R=3 -DBWD_M=1 -DBWD_N=2 -DBWD_R=5")
for f in "${V[@]}"; do python3 scratch/tune.py build "$f" > $OUT/build.$((++n)) 2>&1 & done; wait
tail -n 3 $OUT/build.*; mkdir -p /tmp/b; mv $OUT/build.* /tmp/b
timeout 150 python3 -m pytest tests/test_ops.py -m gpu -q -x -p no:cacheprovider -k "not compile and not 31_bits" 2>&1 | tail -40 | cut -c1-300
python3 scratch/tune.py full "" 2>&1 | tee $OUT/full.txt
for f in "${V[@]:1}"; do timeout 60 python3 scratch/tune.py quick "$f" 2>&1 | tee -a $OUT/quick.txt; done
timeout 100 ncu --clock-control none --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy --section WarpStateStats --section LaunchStats -k regex:"kernel" python3 scratch/prof.py > $OUT/ncu.txt 2>&1; grep -E "_kernel|Duration|DRAM Through|Throughput +%|L1/TEX Hit|L2 Hit|Registers Per|Achieved Occ|No Eligible|Local" $OUT/ncu.txt | cut -c1-110 | head -90
