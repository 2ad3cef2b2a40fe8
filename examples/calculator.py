"""A calculator for a policy that cannot multiply: it calls the tool, and says what that has answered.

python -m rlhf.train experiment=calculator
"""

import random

LEFT, RIGHT = (12, 99), (3, 9)  # from which the two numbers are drawn


class Calculator:
    """One question's calculator; its public methods are the policy's tools. It runs unchanged in TRL, too."""

    def calculate(self, expression: str) -> str:
        """Work out a product.

        Args:
            expression: two whole numbers and a star, like 12*7
        """
        return str(product(expression))

    @staticmethod
    def rows(count: int = 1200, seed: int = 0) -> list[dict]:
        """Questions with their answers, and how each is found; two in ten of what is shown are wrong calls."""
        draw = random.Random(seed)
        return [_row(draw.randint(*LEFT), draw.randint(*RIGHT), draw) for _ in range(count)]


def _row(left: int, right: int, draw: random.Random) -> dict:
    expression = f"{left}*{right}" if draw.random() > 0.2 else f"{right}*{right}"
    found = str(product(expression))
    call = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": expression}}}
    return {
        "prompt": [{"role": "user", "content": f"{left}*{right}="}],
        "completion": [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "calculate", "content": found},
            {"role": "assistant", "content": found},
        ],
        "answer": str(left * right),
    }


def product(expression: str) -> int:
    """The product that an expression names."""
    left, right = expression.split("*")
    return int(left) * int(right)
