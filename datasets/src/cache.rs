//! A cache folder for decoded files.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use candlepower::atomic_file::partial;
use candlepower::error::{Error, Result};
use sha2::{Digest, Sha256};

use crate::bytes::Bytes;

/// The destination of decoded bytes.
pub(crate) enum Sink {
    Memory(Vec<u8>),
    File { file: BufWriter<File>, path: PathBuf },
}

impl Sink {
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Memory(all) => all.extend_from_slice(bytes),
            Self::File { file, path } => file.write_all(bytes).map_err(Error::file(path))?,
        }
        Ok(())
    }
}

/// The `len` bytes that `decode` makes of these files: in memory, or, with a folder, in a file that later runs reuse.
///
/// The cache file's name is a digest of everything that the bytes depend on: `settings`, and the files'
/// names, sizes and times (mtime, and ctime, which no program can set back). So stale data is never found.
/// The file is written completely or not at all. File times are only as fine as the system's clock ticks:
/// data decoded within [`TICK`] of a change may stem from before or after it, so it is decoded again.
pub(crate) fn decoded(
    folder: Option<&Path>,
    settings: &str,
    files: &[PathBuf],
    len: u64,
    decode: impl FnOnce(&mut Sink) -> Result<()>,
) -> Result<Bytes> {
    let Some(folder) = folder else {
        let mut sink = Sink::Memory(Vec::with_capacity(len as usize));
        decode(&mut sink)?;
        let Sink::Memory(bytes) = sink else {
            return Err(Error::msg("the frames decoded into memory are gone"));
        };
        return Ok(Bytes::Memory(bytes));
    };
    std::fs::create_dir_all(folder).map_err(Error::file(folder))?;
    let path = folder.join(format!("{}.frames", digest(settings, files)?));
    if let Ok(known) = Bytes::open(&path)
        && known.len() == len
        && is_settled(&path, files)?
    {
        return Ok(known);
    }
    tracing::info!("decoding {} files into {}", files.len(), path.display());
    sweep(folder, ABANDONED);
    let partial = partial(&path);
    let written = write(&partial, decode)
        .and_then(|()| std::fs::rename(&partial, &path).map_err(Error::file(&path)))
        .and_then(|()| Bytes::open(&path));
    if written.is_err() {
        // The partial file may not exist. Report the first error.
        let _ = std::fs::remove_file(&partial);
    }
    written
}

/// The minimum age of a partial file before it is removed, because its writer may not have locked it yet.
const ABANDONED: Duration = Duration::from_secs(60);

/// Removes partial files left behind by processes that were killed while decoding. Files that cannot be
/// removed do no harm.
fn sweep(folder: &Path, age: Duration) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_old = || Some(entry.metadata().ok()?.modified().ok()?.elapsed().ok()? >= age);
        if path.extension().is_some_and(|ending| ending == "partial")
            && is_old() == Some(true)
            && File::open(&path).is_ok_and(|file| file.try_lock().is_ok())
        {
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// Two changes of a file within this time may leave it with the time of the first change.
const TICK: Duration = Duration::from_millis(100);

/// Whether a cache file was written more than [`TICK`] after the last change of any file, by their ctimes.
fn is_settled(cache: &Path, files: &[PathBuf]) -> Result<bool> {
    let changed = |path: &Path| {
        let known = std::fs::metadata(path).map_err(Error::file(path))?;
        Ok(Duration::new(known.ctime().max(0) as u64, known.ctime_nsec().clamp(0, 999_999_999) as u32))
    };
    let written = changed(cache)?;
    let newest = files
        .iter()
        .map(|file| changed(file))
        .try_fold(Duration::ZERO, |newest, time: Result<_>| Ok::<_, Error>(newest.max(time?)))?;
    Ok(written > newest + TICK)
}

fn write(path: &Path, decode: impl FnOnce(&mut Sink) -> Result<()>) -> Result<()> {
    let file = File::create_new(path).map_err(Error::file(path))?;
    // The lock keeps other processes from sweeping the file away. File systems without locks do without.
    let _ = file.lock();
    let mut sink = Sink::File { file: BufWriter::new(file), path: path.to_path_buf() };
    decode(&mut sink)?;
    let Sink::File { mut file, .. } = sink else { return Ok(()) };
    file.flush().and_then(|()| file.get_ref().sync_all()).map_err(Error::file(path))
}

fn digest(settings: &str, files: &[PathBuf]) -> Result<String> {
    let mut hash = Sha256::new();
    let mut add = |part: &[u8]| {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    };
    add(env!("CARGO_PKG_VERSION").as_bytes());
    add(settings.as_bytes());
    for file in files {
        let known = std::fs::metadata(file).map_err(Error::file(file))?;
        add(file.as_os_str().as_encoded_bytes());
        for number in
            [known.len() as i64, known.mtime(), known.mtime_nsec(), known.ctime(), known.ctime_nsec()]
        {
            add(&number.to_le_bytes());
        }
    }
    Ok(hash.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_is_left_behind_is_swept_away_and_what_is_being_written_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let [left, young, written, other] =
            ["a.1.partial", "b.2.partial", "c.3.partial", "d.frames"].map(|name| folder.path().join(name));
        for path in [&left, &young, &written, &other] {
            std::fs::write(path, "half").unwrap();
        }
        let old = std::time::SystemTime::now() - Duration::from_secs(100);
        for path in [&left, &written, &other] {
            File::options().write(true).open(path).unwrap().set_modified(old).unwrap();
        }
        let writing = File::open(&written).unwrap();
        writing.lock().unwrap();
        sweep(folder.path(), ABANDONED);
        assert_eq!([&left, &young, &written, &other].map(|path| path.exists()), [false, true, true, true]);
    }

    /// The contents of these files, concatenated, and whether they were decoded just now.
    fn content(folder: Option<&Path>, settings: &str, files: &[PathBuf], len: u64) -> (Vec<u8>, bool) {
        let mut fresh = false;
        let bytes = decoded(folder, settings, files, len, |sink| {
            fresh = true;
            files.iter().try_for_each(|file| sink.write(&std::fs::read(file).unwrap()))
        });
        let bytes = bytes.unwrap();
        let mut all = vec![0; bytes.len() as usize];
        bytes.read(0, &mut all).unwrap();
        (all, fresh)
    }

    #[test]
    fn what_is_stale_is_never_found() {
        let dir = tempfile::tempdir().unwrap();
        let (cache, file) = (dir.path().join("cache"), dir.path().join("a"));
        std::fs::write(&file, "abc").unwrap();
        let files = [file.clone()];
        let cached = |settings: &str| content(Some(&cache), settings, &files, 3);
        let settle = || std::thread::sleep(TICK + TICK / 2);
        settle();
        assert_eq!(cached("x"), (b"abc".to_vec(), true));
        assert_eq!(cached("x"), (b"abc".to_vec(), false));
        assert_eq!(cached("y"), (b"abc".to_vec(), true));
        // Same length and modification time as before.
        let modified = file.metadata().unwrap().modified().unwrap();
        std::fs::write(&file, "xyz").unwrap();
        File::options().write(true).open(&file).unwrap().set_modified(modified).unwrap();
        settle();
        // Rewriting the cache file does not make its content newer.
        for entry in std::fs::read_dir(&cache).unwrap() {
            std::fs::write(entry.unwrap().path(), "abc").unwrap();
        }
        assert_eq!(cached("x"), (b"xyz".to_vec(), true));
        assert_eq!(cached("x"), (b"xyz".to_vec(), false));
        // A cache file that was truncated.
        for entry in std::fs::read_dir(&cache).unwrap() {
            std::fs::write(entry.unwrap().path(), "x").unwrap();
        }
        assert_eq!(cached("x"), (b"xyz".to_vec(), true));
        assert_eq!(content(None, "x", &files, 3), (b"xyz".to_vec(), true));
    }

    #[test]
    fn what_was_decoded_before_or_close_to_a_change_is_not_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let (cache, files) = (dir.path().join("cache"), [dir.path().join("a")]);
        std::fs::write(&cache, "").unwrap();
        std::fs::write(&files[0], "").unwrap();
        assert!(!is_settled(&cache, &files).unwrap());
        std::thread::sleep(TICK + TICK / 2);
        std::fs::write(&cache, "later").unwrap();
        assert!(is_settled(&cache, &files).unwrap());
    }

    #[test]
    fn nothing_half_written_stays() {
        let dir = tempfile::tempdir().unwrap();
        let failed = decoded(Some(dir.path()), "", &[], 9, |sink| {
            sink.write(b"some")?;
            Err(Error::msg("broken"))
        });
        assert_eq!(failed.err().unwrap().to_string(), "broken");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let missing = [dir.path().join("none")];
        assert!(matches!(decoded(Some(dir.path()), "", &missing, 0, |_| Ok(())), Err(Error::File { .. })));
    }
}
