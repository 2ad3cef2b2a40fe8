"""OpenAI's endpoint before the run's workers: programs that know nothing of training are sampled through it.

A session is one row's: its calls are recorded as tokens (turns.py), which no tokenizer makes of texts again. forms.py
reads requests and answers.py writes answers, calls.py does what is asked, app.py and server.py are the HTTP, and
sampling.py has the workers sample. What is learned from a session is not known here.
"""
