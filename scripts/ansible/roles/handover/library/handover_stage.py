#!/usr/bin/python
"""Makes a release of an artifact: a directory that is there as a whole or not at all, and is never changed again."""

from __future__ import annotations

DOCUMENTATION = r"""
module: handover_stage
short_description: Stage a release beside those that are there
description:
  - Without C(artifact) it only says whether the release is there; C(changed) means that it is not.
  - With it, the release is made of that file, which is gone afterwards.
options:
  root:
    description: Where C(releases/) is.
    type: path
    required: true
  release:
    description: The directory below C(releases/).
    type: str
    required: true
  checksum:
    description: The SHA-256 of the artifact. Another build under the same name is refused. Empty if there is no artifact
      any more; then the release has to be there, whatever it was made of.
    type: str
    default: ''
  artifact:
    description: A tar archive, compressed or not, or else the program itself, on this machine.
    type: path
  program:
    description: The name of a program that is no archive, seen from the release.
    type: str
    default: ''
author: handover
"""

EXAMPLES = r"""
- name: Make the release
  handover_stage:
    root: /srv/app
    release: "43"
    checksum: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    artifact: /srv/app/releases/.43.artifact
"""

RETURN = r"""
release:
  description: The directory.
  returned: success
  type: str
"""

import hashlib
import os
import shutil
import tarfile

from ansible.module_utils.basic import AnsibleModule

CHECKSUM = ".handover-checksum"


class Trouble(Exception):
    """Why it was not done, as a sentence for the operator."""


def is_staged(directory, checksum):
    if not os.path.isdir(directory):
        if not checksum:
            raise Trouble("it is not staged here: name its artifact (`handover_artifact`)")
        return False
    if not checksum:
        return True
    try:
        with open(os.path.join(directory, CHECKSUM), encoding="ascii") as file:
            found = file.read().strip()
    except OSError:
        found = "unknown, since nobody has staged it this way"
    if found != checksum:
        raise Trouble(f"{directory} is another build (checksum {found}): give this release another name")
    return True


def checksum_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def make(directory, parameters):
    artifact, checksum = parameters["artifact"], parameters["checksum"]
    if checksum_of(artifact) != checksum:
        raise Trouble(f"{artifact} did not arrive as it was sent: its checksum is another")
    head, name = os.path.split(directory)
    partial = os.path.join(head, f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial, 0o755)
    if tarfile.is_tarfile(artifact):
        with tarfile.open(artifact) as archive:
            # Python before 3.12, or without the fix of its older versions, knows of no filter.
            kept = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}
            archive.extractall(partial, **kept)
    elif not parameters["program"]:
        raise Trouble("the artifact is no tar archive, and no program was named for what it is (`handover_program`)")
    else:
        program = os.path.join(partial, parameters["program"])
        os.makedirs(os.path.dirname(program), 0o755, exist_ok=True)
        shutil.copyfile(artifact, program)
        os.chmod(program, 0o755)
    with open(os.path.join(partial, CHECKSUM), "w", encoding="ascii") as file:
        file.write(checksum + "\n")
    # Before the name says that it is whole: a machine may lose its power.
    os.sync()
    os.rename(partial, directory)
    os.unlink(artifact)


def main():
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "release": {"type": "str", "required": True},
            "checksum": {"type": "str", "default": ""},
            "artifact": {"type": "path"},
            "program": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    directory = os.path.join(module.params["root"], "releases", module.params["release"])
    try:
        staged = is_staged(directory, module.params["checksum"])
        if not staged and not module.check_mode:
            if module.params["artifact"]:
                make(directory, module.params)
            else:
                os.makedirs(os.path.dirname(directory), 0o755, exist_ok=True)
    except (Trouble, OSError, tarfile.TarError) as trouble:
        module.fail_json(msg=f"cannot stage release {module.params['release']}: {trouble}")
    module.exit_json(changed=not staged, release=directory)


if __name__ == "__main__":
    main()
