"""`python train_qlora.py --model_name ... --dataset ...`: fine-tune a chat model with QLoRA. See `--help`, and nbs/week2/02_qlora.ipynb."""
import sys

from mlcourse.qlora import main

if __name__ == "__main__": sys.exit(main())
