"""What an exported model recommends, with titles.

python launch/recommend.py runs/quickstart/export --history 50 181 172
python launch/recommend.py runs/quickstart/export --data ml-100k --user 1
"""

from command import arguments, run


def main(options) -> None:
    from transformers.utils import logging

    from ds_recsys import Recommender, UserError
    from ds_recsys.assemble import load_interactions
    from ds_recsys.cache import default_cache
    from ds_recsys.config.schema import Dataset

    logging.disable_progress_bar()
    recommender = Recommender.from_pretrained(options.model)
    history = options.history
    if history is None:
        if options.data is None or options.user is None:
            raise UserError("recommend: give --history, or --data and --user")
        log = load_interactions(Dataset(path=options.data, format=options.format), default_cache())
        history = log.history_of(options.user)
    title = dict(zip(recommender.items, recommender.titles or recommender.items, strict=True))
    print(f"after {', '.join(title.get(str(item), str(item)) for item in history[-5:])}:")
    for place, found in enumerate(recommender.recommend(history, options.k), start=1):
        print(f"{place:3d}. {found.title or found.item}  ({found.score:.2f})")


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("model", help="exported folder")
    parser.add_argument("--history", nargs="+", help="item ids as in the log, oldest first")
    parser.add_argument("--data", help="log to take the history of --user from")
    parser.add_argument("--format", default="auto", help="layout of that log (auto)")
    parser.add_argument("--user", help="user id as in the log")
    parser.add_argument("--k", type=int, default=10, help="how many (10)")
    run(main, parser)
