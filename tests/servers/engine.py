"""A program: what vLLM's engine makes of rows of token ids. Prints one line with JSON."""

import json
import sys


def main(folder, rows, new_tokens, options):
    from vllm import LLM, SamplingParams

    usual = {"max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 512, "dtype": "float32"}
    llm = LLM(folder, skip_tokenizer_init=True, **(usual | {"enforce_eager": True} | json.loads(options)))
    how = SamplingParams(
        temperature=0, max_tokens=int(new_tokens), ignore_eos=True, detokenize=False, prompt_logprobs=0
    )
    outputs = llm.generate([{"prompt_token_ids": row} for row in json.loads(rows)], how, use_tqdm=False)
    scores = [
        [place[token].logprob for place, token in zip(done.prompt_logprobs[1:], done.prompt_token_ids[1:], strict=True)]
        for done in outputs
    ]
    print("RESULT", json.dumps({"scores": scores, "tokens": [list(done.outputs[0].token_ids) for done in outputs]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
