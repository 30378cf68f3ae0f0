//! Builds the shim that Postgres loads, so that the program can carry it inside (`src/shim.rs`).

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let root = here.parent().expect("the crate lies in the workspace").to_owned();
    for input in ["compute/shim/src", "compute/shim/Cargo.toml", "compute/page-cache/src", "types/src"] {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }
    let target_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("shim");
    // What is in the package cache already is enough as a rule; only a fresh checkout has to ask a registry.
    if !build(&root, &target_dir, true) && !build(&root, &target_dir, false) {
        panic!("the shim (compute/shim) could not be built");
    }
    let library = target_dir.join("release/libdormouse_shim.so");
    assert!(library.exists(), "the shim's build left no {}", library.display());
    println!("cargo::rustc-env=DORMOUSE_SHIM_LIBRARY={}", library.display());
}

fn build(root: &Path, target_dir: &Path, offline: bool) -> bool {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--release", "--manifest-path"]).arg(root.join("compute/shim/Cargo.toml"));
    cargo.arg("--target-dir").arg(target_dir);
    if offline {
        cargo.arg("--offline");
    }
    // What this build was told must not leak into that one: it is another profile, and may be linted, not compiled, here.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let inherited = text.starts_with("CARGO_") && text != "CARGO_HOME";
        if inherited || text == "RUSTC_WORKSPACE_WRAPPER" || text == "RUSTFLAGS" {
            cargo.env_remove(&name);
        }
    }
    cargo.status().is_ok_and(|status| status.success())
}
