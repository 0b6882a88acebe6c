"""Bandwidth of every case over the size of its tensors, against the machine's."""


def draw(rows, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = ["eval", "train_forward", "backward"]
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), sharey=True)
    styles = {"floor": ("black", "_"), "ours": ("tab:blue", "o"),
              "onednn": ("tab:orange", "x"), "onednn_blocked": ("tab:red", "+"),
              "torch": ("tab:green", "v")}
    for axis, operation in zip(axes, panels):
        for name, (color, marker) in styles.items():
            points = []
            for row in rows:
                if operation not in row["case"].split("/"):
                    continue
                time = row.get(f"{name}_ms", row["peers"].get(name))
                if time:
                    points.append((row["bytes"] / 2**20, row["bytes"] / time / 1e6))
            if points:
                axis.scatter(*zip(*points), s=28, c=color, marker=marker, label=name)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(operation)
        axis.set_xlabel("MiB that must move")
        axis.grid(True, which="both", alpha=0.2)
    axes[0].set_ylabel("GB/s")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
