"""What the commands print at 80 columns: the cases, how they are run, and which figures are masked.

The files in tests/golden/ hold the answers. `python tests/golden_update.py` makes them anew; tests/test_golden.py compares."""
import contextlib, csv, io, json, os, re, sys
from pathlib import Path

GOLDEN = Path(__file__).parent / 'golden'
COMMANDS = ['quickstart', 'run', 'plan', 'data', 'train', 'eval', 'merge', 'chat', 'control', 'models', 'settings', 'init', 'doctor']
SMALL = ['--max-steps', '4', '--learning-rate', '2e-3', '--set', 'eval_max_rows=24', '--set', 'generate_max_rows=8', '--set', 'n_bootstrap=100', '--set', 'max_new_tokens=8', '--set', 'eval_steps=4']
TICKETS = ['--data', 'tickets/tickets.csv', '--max-rows', '80', '--max-length', '256', '--set', 'overlong_rows=drop']

# name -> what is typed; a list of words, or a function of no arguments that prints
CASES = {f'help_{command}': [command, '--help'] for command in COMMANDS}
CASES |= {f'help_data_{action}': ['data', action, '--help'] for action in ('check', 'show', 'stats', 'clean')}
CASES |= dict(
    help=[],
    typo_command=['quikstart'],
    typo_option=['run', '--max-lenght', '64'],
    typo_setting=['run', '--data', 'faq.csv', '--set', 'lerning_rate=1e-4'],
    setting_as_option=['run', '--lora-alpha', '8'],
    setting_of_others=['run', '--data', 'faq.csv', '--set', 'load_in_4bit=true'],
    setting_out_of_range=['run', '--data', 'faq.csv', '--lora-r', '0'],
    setting_contradiction=['run', '--data', 'faq.csv', '--method', 'full', '--set', 'use_dora=true'],
    settings=['settings'],
    settings_word=['settings', 'batch'],
    settings_nothing=['settings', 'colour'],
    init=['init', '--data', 'faq.csv', '--epochs', '2'],
    init_again=['init'],
    quickstart=['quickstart', '--name', 'quick', *SMALL[4:], '--set', 'max_steps=4'],
    data_classification=['data', *TICKETS],
    data_questions=['data', '--data', 'faq.csv'],
    data_chat=['data', '--data', 'chat.jsonl'],
    data_missing=['data', '--data', 'nowhere.csv'],
    data_columns=['data', '--data', 'numbers.csv'],
    data_check=['data', 'check', 'tickets/tickets.csv', '--max-length', '256'],
    data_check_refused=['data', 'check', 'same.jsonl'],
    data_stats_json=['data', 'stats', 'faq.csv', '--json'],
    data_stats=['data', 'stats', 'tickets/tickets.csv', '--max-length', '256'],
    data_stats_two=['data', 'stats', 'faq.csv', 'chat.jsonl'],
    data_show=['data', 'show', 'odd.jsonl', '--rows', '1-3'],
    data_show_unknown=['data', 'show', 'odd.jsonl', '--rows', '99'],
    data_show_html=['data', 'show', 'odd.jsonl', '--random', '2', '--html', 'odd.html'],
    data_clean=['data', 'clean', 'tickets/tickets.csv', '--out', 'clean.csv'],
    data_clean_again=['data', 'clean', 'tickets/tickets.csv', '--out', 'clean.csv'],
    data_mixed=['data', '--data', 'faq.csv', '--data', 'chat.jsonl'],
    run=['run', *TICKETS, '--name', 'first', *SMALL],
    run_aliases=['data', '--data', 'faq.csv', '--set', 'max_seq_length=128', '--set', 'random_state=1'],
    run_without_data=['run'],
    run_twice=['run', *TICKETS, '--name', 'first'],
    run_by_name=['run', '--data', 'faq.csv', '--model', 'Llama-3.2-1B'],
    run_offline=['run', '--data', 'faq.csv', '--model', 'owner/model'],
    train=['train', *TICKETS, '--name', 'second', *SMALL],
    train_again=['train', '--resume', 'second'],
    eval=['eval', 'first'],
    eval_unknown=['eval', 'frist'],
    merge=['merge', 'first', '--out', 'merged'],
    chat=['chat', 'first', '--prompt', 'Where is my parcel?', '--max-new-tokens', '8'],
    chat_unknown=['chat', 'nothing'],
    control=['control', 'first'],
    control_finished=['control', 'first', 'pause'],
    models=['models'],
    plan=['plan', '--model', 'Llama-3.1-8B', '--gpu', '4090', '--max-length', '2048'],
    plan_verbose=['plan', '--model', 'Llama-3.1-8B', '--gpu', '4090', '--max-length', '2048', '--verbose'],
    plan_too_large=['plan', '--model', 'Llama-3.1-8B', '--gib', '12', '--method', 'lora', '--max-length', '2048'],
    plan_fit=['plan', '--model', 'Llama-3.1-8B', '--gib', '16', '--max-length', '1024', '--fit'],
    plan_unknown_gpu=['plan', '--gpu', 'RTX 4900'],
)


def ask_the_doctor(**changes):
    "Print what the doctor says about a machine that works but for these changes."
    from homelab_ft.hardware.doctor import diagnose
    from test_hardware_doctor import machine
    print(diagnose(machine(**changes)))


def chat_by_hand():
    "Print a conversation as a person has it."
    from homelab_ft.deploy.chat import load_chat, talk
    typed = iter(['/help', 'The day was fine, and', '/exit'])

    def ask(prompt):
        line = next(typed)
        print(prompt + line)
        return line

    talk(load_chat('embedded'), 'embedded', ask, max_new_tokens=8, temperature=0.)


CASES |= dict(
    doctor_fine=ask_the_doctor,
    doctor_new_gpu=lambda: ask_the_doctor(gpu='NVIDIA GeForce RTX 5090', capability=(12, 0), torch_archs=['sm_80', 'sm_90'], compiler=None),
    doctor_cpu_build=lambda: ask_the_doctor(torch_cuda=None, torch_sees_gpu=False, wsl=True),
    chat_by_hand=chat_by_hand,
)

RUNS = ['quickstart', 'run', 'train']
NEEDED = dict.fromkeys(['run_twice', 'train_again', 'eval', 'eval_unknown', 'merge', 'chat', 'chat_unknown', 'control', 'control_finished', 'models'], RUNS)
NEEDED |= {'init_again': ['init'], 'data_clean_again': ['data_clean']}                            # case -> the cases that must have been run before it
TRAINED = {'quickstart', 'run', 'train', 'eval', 'merge', 'control', 'control_finished', 'models'}      # whose decimals are masked
MASKS = [                                                     # what differs from machine to machine or from run to run
    (r'\d{4}-\d\d-\d\d[T_ ]\d\d[:-]\d\d[:-]\d\dZ?', '<date>'),
    (r'\b\d+ h \d\d min\b|\b\d+ min \d\d s\b|\b\d+(\.\d+)? s\b', '<time>'),
    (r'\d[\d,.]* tokens per second', '<n> tokens per second'),
]
LINES_LEFT_OUT = r'^(loading the model|training, loss [\d.]+|likelihood|labels|answers|tokenizing)(:.*)?\n'      # progress, if it was slow


def mask(name, text):
    "The text without figures that differ between runs; of trained models, every decimal is one."
    text = re.sub(LINES_LEFT_OUT, '', text, flags=re.M)
    for pattern, word in MASKS: text = re.sub(pattern, word, text)
    if name in TRAINED: text = re.sub(r'[+-]?\d+\.\d+(e-?\d+)?', lambda number: re.sub(r'[-+\d]', '#', number[0]), text)
    return text


def same(name, text):
    "What is compared: of trained models, words only, since masked figures are wide or narrow and lines break elsewhere."
    if name not in TRAINED: return '\n'.join(line.rstrip() for line in text.splitlines())
    words = re.sub(r'#+\.#+', '#', re.sub(r'-{3,}', '---', text)).split()
    return '\n'.join(word for word in words if word != '---')


def write_files(folder):
    "The files that the commands read."
    from homelab_ft.data.sample.tickets import write_tickets
    write_tickets(folder / 'tickets')
    topics = ['parcel', 'invoice', 'password', 'refund', 'address', 'voucher', 'delivery', 'account', 'order', 'return']
    with open(folder / 'faq.csv', 'w', newline='') as file:
        rows = csv.writer(file)
        rows.writerow(['question', 'answer'])
        for i in range(40):
            topic = topics[i % 10]
            rows.writerow([f'What do I do about my {topic}, case {i * 7}?', f'Please send the number of the {topic} to desk {i % 4 + 1}.'])
    chat = [f'{{"messages": [{{"role": "user", "content": "Where is {topics[i % 10]} {i * 3}?"}}, '
            f'{{"role": "assistant", "content": "It is on shelf {i}."}}]}}\n' for i in range(40)]
    (folder / 'chat.jsonl').write_text(''.join(chat))
    odd = [dict(prompt='\x1b[31mRed?\x1b[0m <b>', completion='It is \u202e not.'), dict(prompt='', completion='Nothing'),
           dict(prompt='日本はどこ? ' * 12, completion='アジア。' * 20)]
    odd += [dict(prompt=f'Where is shelf {i * 13}?', completion=f'In room {i}.') for i in range(30)]
    (folder / 'odd.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in odd))
    same = [dict(prompt='Where is it?', completion=f'In room {i}.') for i in range(30)]
    (folder / 'same.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in same))
    (folder / 'numbers.csv').write_text('foo,bar\n' + ''.join(f'{i},{i * 7}\n' for i in range(30)))


def run_case(case):
    "What a case prints, output and errors together, with the exit code."
    from homelab_ft.cli import main
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try: code = main(case) if isinstance(case, list) else case() or 0
        except SystemExit as exit: code = exit.code
    return f'{printed.getvalue().rstrip()}\n[exit code {code}]\n'


def typed(case):
    "The line that a person types."
    return ' '.join(['$ homelab-ft', *(f"'{word}'" if ' ' in word or '?' in word else word for word in case)]) if isinstance(case, list) else '$'


def run_all(folder, names=None):
    "Every case in its order, in a folder that is empty at first; yields name and text."
    import torch
    needed = set(names or CASES).union(*(NEEDED.get(name, []) for name in names or []))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before, environment = os.getcwd(), dict(os.environ)
    os.environ |= dict(COLUMNS='80', LINES='24', HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', HOME=str(folder), CUDA_VISIBLE_DEVICES='')
    os.environ.pop('HOMELAB_FT_GPUS', None)
    os.chdir(folder)
    sys.modules['pynvml'], nvml = None, sys.modules.get('pynvml')
    try:
        write_files(Path(folder))
        for name, case in CASES.items():
            if name not in needed: continue
            text = mask(name, run_case(case))
            if name in (names or CASES): yield name, text
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ |= environment
        torch.set_num_threads(threads)
        del sys.modules['pynvml']
        if nvml: sys.modules['pynvml'] = nvml
