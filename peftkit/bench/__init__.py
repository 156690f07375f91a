"""The benchmark harness: suite -> cells (one process each) -> results.json -> report, and a gate for CI.

    from peftkit.bench.baseline import load_baseline
    from peftkit.bench.cells import load_results, run_suite
    from peftkit.bench.gate import gate
    from peftkit.bench.report import markdown
    from peftkit.bench.suite import load_suite

    run_suite(load_suite("benchmarks/suites/ci.yaml"), "runs/bench")
    results = load_results("runs/bench/ci")
    print(markdown(results))
    verdicts = gate(results, load_baseline("baseline.json"))

The names stay in their modules: two modules are called as their main function, and importing it here would hide the module.
"""
