def write_run_report(*a): return "verdict", "none"
def print_results(results): print(results)
