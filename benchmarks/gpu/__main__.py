import sys

from benchmarks.gpu import run, studies

if sys.argv[1:2] == ["studies"]:
    sys.exit(studies.main(sys.argv[2:]))
sys.exit(run.main())
