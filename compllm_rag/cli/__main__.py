"""`python -m compllm_rag.cli` is `compllm-rag`."""

from compllm_rag.cli.main import main

if __name__ == "__main__":
    main()
