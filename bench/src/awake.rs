//! Keeps the machine's processors from halting while microseconds are measured: a virtual machine's take longer to come back
//! than what is measured takes.

use std::{
    process::{Child, Command, Stdio},
    thread::available_parallelism,
};

/// One loop for each processor, which gets only time that nobody else wants. Ends when dropped.
pub struct Awake(Vec<Child>);

impl Awake {
    /// Errors when `chrt` (util-linux) can't be started.
    pub fn new() -> anyhow::Result<Awake> {
        let mut loops = Awake(Vec::new());
        for _ in 0..available_parallelism()?.get() {
            let mut command = Command::new("chrt");
            command.args(["--idle", "0", "sh", "-c", "while :; do :; done"]).stdin(Stdio::null());
            loops.0.push(command.spawn()?);
        }
        Ok(loops)
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // Harmless when it has ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
