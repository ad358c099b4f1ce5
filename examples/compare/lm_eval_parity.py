"""Holds predictions of `cl eval` against the samples of lm-eval (`--log_samples`) for the same model and documents.

Run:  python lm_eval_parity.py LM_EVAL_OUT CL_OUT

Tasks are paired by name (a prefix `local_` of lm-eval's does not count), documents by their order. Prints the largest difference
of log-likelihoods, documents whose acc or acc_norm differ, with the margin between the best two choices there, and generated
answers that are not the same.
"""

import glob
import json
import os
import re
import sys


def samples(folder):
    found = {}
    for path in sorted(glob.glob(os.path.join(folder, "**", "samples_*.jsonl"), recursive=True)):
        task = re.match(r"samples_(?:local_)?(.*?)_\d{4}-", os.path.basename(path)).group(1)
        rows = [json.loads(line) for line in open(path, encoding="utf-8")]
        found[task] = sorted(rows, key=lambda row: row["doc_id"])  # a document comes once for each filter
    return found


def main():
    theirs, folder = samples(sys.argv[1]), sys.argv[2]
    for task, rows in theirs.items():
        ours = [json.loads(line) for line in open(os.path.join(folder, f"{task}.jsonl"), encoding="utf-8")]
        largest, requests, flips, texts, answers = 0.0, 0, [], 0, 0
        for row in rows:
            mine = ours[row["doc_id"]]
            if "text" in mine["response"]:
                answers += 1
                texts += mine["response"]["text"] == row["resps"][0][0]
                names = {"flexible-extract": "flexible_extract", "strict-match": "strict_match"}
                metrics = {"exact_match": names.get(row.get("filter"), "exact_match")}
            else:
                sums = mine["response"]["loglikelihoods"]
                reference = [float(r[0]) for r in row["filtered_resps"]]
                assert len(sums) == len(reference), (task, row["doc_id"])
                requests += len(sums)
                largest = max([largest] + [abs(a - b) for a, b in zip(sums, reference)])
                metrics = {"acc": "acc", "acc_norm": "acc_norm"}
            for metric, own in metrics.items():
                if metric in row and own in mine["scores"] and float(row[metric]) != mine["scores"][own]:
                    margin = None
                    if requests:
                        lengths = [len(c) if metric == "acc_norm" else 1 for c in mine["target"]["choice"]["choices"]]
                        best = sorted((a / n for a, n in zip(reference, lengths)), reverse=True)
                        margin = best[0] - best[1]
                    flips.append((row["doc_id"], metric, margin))
        what = f"{requests} log-likelihoods, largest difference {largest:.2e}" if requests else f"{texts} of {answers} answers the same"
        print(f"{task}: {len({r['doc_id'] for r in rows})} documents, {what}, {len(flips)} scores differ {flips or ''}")


main()
