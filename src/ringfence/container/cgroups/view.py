"""What a container sees of its own control groups, at the place where programs look for them."""

from __future__ import annotations

from ringfence.container import mounts
from ringfence.container.fields import Fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container

    from ringfence.container.cgroups.group import Group

__all__ = ["cgroup_mounts", "mount_table"]


def cgroup_mounts(
    mount: Fields, group: Group | None, links: list[tuple[str, str]], kinds: Container[str]
) -> list[dict[str, object]]:
    """The container's own cgroups at one place, in the shape that programs expect there."""
    target = mount.text("destination")
    options = mounts.split_options(mount.texts("options"))
    read_only = options.flags & 1
    if group is None or not group.directories:
        return []
    if group.unified:
        if "cgroup" in kinds:
            return [
                {
                    "target": target,
                    "filesystem": "cgroup2",
                    "source": "cgroup",
                    "flags": options.flags,
                }
            ]
        path = group.directories[0][1]
        return [_bind(path, target, options.flags & 0xF)]
    result: list[dict[str, object]] = [
        {
            "target": target,
            "filesystem": "tmpfs",
            "source": "tmpfs",
            "flags": options.flags & ~1,
            "data": "mode=755",
        }
    ]
    for names, path, version in group.directories:
        folder = "unified" if version == 2 else ",".join(names).removeprefix("name=")
        result.append(_bind(path, f"{target}/{folder}", options.flags & 0xF))
        if version == 1 and len(names) > 1:
            links += [(f"{target}/{name}", folder) for name in names]
    if read_only and not links:
        # MS_REMOUNT and MS_BIND: this mount of the file system, not the file system.
        result.append(
            {
                "target": target,
                "filesystem": "tmpfs",
                "source": "tmpfs",
                "flags": (options.flags & 0xF) | 32 | 4096,
            }
        )
    return result


def mount_table(
    table: list[dict[str, object]], group: Group, kinds: Container[str]
) -> list[dict[str, object]]:
    """Mounts of a configuration as a plan's.

    Args:
        table: As a configuration's ``mounts``.
        group: The container's cgroups.
        kinds: Its own namespaces.
    """
    compiled: list[dict[str, object]] = []
    for values in table:
        mount = Fields(values, "mounts")
        if mount.text("type") == "cgroup":
            compiled += cgroup_mounts(mount, group, [], kinds)
        else:
            compiled.append(mounts.compile_mount(mount, "/"))
    return compiled


def _bind(source: str, target: str, attributes: int) -> dict[str, object]:
    return {"source": source, "target": target, "set": attributes, "recursive": True}
