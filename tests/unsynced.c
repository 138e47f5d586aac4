/* Keeps an undo journal of what a process changed below a folder without syncing it.
 *
 *     UNSYNCED_FOLDER=/data UNSYNCED_JOURNAL=/elsewhere/journal LD_PRELOAD=./unsynced.so program
 *
 * Every process has a journal of its own, named by its number, which survives kill -9; the times of
 * the entries order those of several. Undoing, newest first, every entry that no later sync covers
 * gives the files as a power cut could have left them. Entries are written before the change they
 * undo; a sync covers what was noted before it began, once it has returned. A file that was created,
 * renamed or unlinked stays so only after a sync of the folder that it is in, or was in. The shared
 * memory of SQLite is no data. While the file UNSYNCED_JOURNAL.lies exists the disk lies: what it
 * says is synced is not.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { WRITE = 1, SYNC, CREATE, RENAME, UNLINK };

struct entry {
  uint64_t kind, inode, offset, size, paths, data, time;
};

#define MAX_FDS 65536
static char tracked[MAX_FDS];
static char folder[PATH_MAX], journal_path[PATH_MAX], lies_path[PATH_MAX];
static int journal = -1;
static atomic_long saved_count;

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void start(void) {
  const char *below = getenv("UNSYNCED_FOLDER"), *path = getenv("UNSYNCED_JOURNAL");
  if (!below || !path || !realpath(below, folder)) return;
  snprintf(journal_path, PATH_MAX, "%.3000s.%d", path, getpid());
  snprintf(lies_path, PATH_MAX, "%.3000s.lies", path);
  journal = REAL(open)(journal_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (journal < 0) abort();
}

static int is_below(const char *path) {
  size_t length = strlen(folder), own = strlen(path);
  if (journal < 0 || strncmp(path, folder, length) || (path[length] && path[length] != '/')) return 0;
  return own < 4 || strcmp(path + own - 4, "-shm");
}

static int name_of(int fd, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return is_below(path);
}

/* The absolute path of a name whose last part need not exist. */
static int absolute(int at, const char *name, char *path) {
  char parent[PATH_MAX], base[PATH_MAX];
  if (at != AT_FDCWD && name[0] != '/') {
    char from[PATH_MAX];
    if (!name_of(at, from)) return 0;
    snprintf(base, sizeof base, "%.2000s/%.2000s", from, name);
  } else {
    snprintf(base, sizeof base, "%s", name);
  }
  char *slash = strrchr(base, '/');
  const char *last = slash ? slash + 1 : base;
  if (slash) *slash = 0;
  if (!realpath(slash ? (base[0] ? base : "/") : ".", parent)) return 0;
  snprintf(path, PATH_MAX, "%.3000s/%.1000s", parent, last);
  return is_below(path);
}

static uint64_t now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static void note(struct entry entry, const char *paths, const void *data) {
  struct iovec parts[3] = {{&entry, sizeof entry},
                           {(void *)paths, entry.paths},
                           {(void *)data, entry.data}};
  ssize_t length = sizeof entry + entry.paths + entry.data;
  if (REAL(writev)(journal, parts, 3) != length) abort();
}

static uint64_t folder_of(const char *path) {
  char parent[PATH_MAX];
  struct stat status;
  snprintf(parent, sizeof parent, "%s", path);
  *strrchr(parent, '/') = 0;
  return stat(parent, &status) ? 0 : status.st_ino;
}

/* Notes a change of names; a file that would be lost gets a second name beside the journal. */
static void note_names(int kind, const char *first, const char *second, const char *lost) {
  char paths[3 * PATH_MAX], saved[PATH_MAX + 64] = "";
  if (lost && !access(lost, F_OK)) {
    snprintf(saved, sizeof saved, "%s-%d-%ld", journal_path, getpid(), saved_count++);
    if (REAL(link)(lost, saved)) abort();
  }
  int length = snprintf(paths, sizeof paths, "%s%c%s%c%s", first, 0, second, 0, saved);
  note((struct entry){kind, folder_of(*second ? second : first), 0, 0, length, 0, now()}, paths, NULL);
}

static void note_write(int fd, uint64_t offset, uint64_t length) {
  struct stat status;
  if (fd < 0 || fd >= MAX_FDS || !tracked[fd] || fstat(fd, &status)) return;
  uint64_t size = status.st_size, kept = 0;
  if (offset < size) kept = size - offset < length ? size - offset : length;
  char *before = malloc(kept + 1), link[64];
  if (kept) {
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int reader = REAL(open)(link, O_RDONLY | O_CLOEXEC);
    if (reader < 0 || pread(reader, before, kept, offset) != (ssize_t)kept) abort();
    REAL(close)(reader);
  }
  note((struct entry){WRITE, status.st_ino, offset, size, 0, kept, now()}, NULL, before);
  free(before);
}

static uint64_t next_offset(int fd) {
  struct stat status;
  if (fcntl(fd, F_GETFL) & O_APPEND) return fstat(fd, &status) ? 0 : status.st_size;
  return lseek(fd, 0, SEEK_CUR);
}

static int opened(int fd, int flags, int is_new, const char *path) {
  char name[PATH_MAX];
  if (fd >= 0 && fd < MAX_FDS && journal >= 0) {
    tracked[fd] = name_of(fd, name);
    if (tracked[fd] && is_new) note_names(CREATE, path, "", NULL);
  }
  return fd;
}

static int open_noted(int at, const char *name, int flags, mode_t mode) {
  char path[PATH_MAX];
  int below = journal >= 0 && absolute(at, name, path);
  int is_new = below && (flags & O_CREAT) && access(path, F_OK);
  if (below && (flags & O_TRUNC) && !is_new) {
    int fd = REAL(openat)(at, name, O_RDWR | O_CLOEXEC);
    struct stat status;
    if (fd >= 0 && fd < MAX_FDS && !fstat(fd, &status)) {
      tracked[fd] = 1;
      note_write(fd, 0, status.st_size);
      tracked[fd] = 0;
      REAL(close)(fd);
    }
  }
  return opened(REAL(openat)(at, name, flags, mode), flags, is_new, path);
}

static mode_t mode_of(int flags, va_list list) {
  return flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;
}

#define OPEN(name, ...)                        \
  int name(__VA_ARGS__, int flags, ...) {      \
    va_list list;                              \
    va_start(list, flags);                     \
    mode_t mode = mode_of(flags, list);        \
    va_end(list);                              \
    return open_noted(AT, path, flags, mode);  \
  }
#define AT AT_FDCWD
OPEN(open, const char *path)
OPEN(open64, const char *path)
#undef AT
#define AT at
OPEN(openat, int at, const char *path)
OPEN(openat64, int at, const char *path)

int close(int fd) {
  if (fd >= 0 && fd < MAX_FDS) tracked[fd] = 0;
  return REAL(close)(fd);
}

ssize_t write(int fd, const void *data, size_t length) {
  if (fd >= 0 && fd < MAX_FDS && tracked[fd]) note_write(fd, next_offset(fd), length);
  return REAL(write)(fd, data, length);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
  size_t length = 0;
  for (int at = 0; at < count; at++) length += parts[at].iov_len;
  if (fd >= 0 && fd < MAX_FDS && tracked[fd]) note_write(fd, next_offset(fd), length);
  return REAL(writev)(fd, parts, count);
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) {
  note_write(fd, offset, length);
  return REAL(pwrite)(fd, data, length, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset) {
  note_write(fd, offset, length);
  return REAL(pwrite64)(fd, data, length, offset);
}

static void note_truncate(int fd, uint64_t length) {
  struct stat status;
  if (fstat(fd, &status)) return;
  uint64_t size = status.st_size;
  note_write(fd, length, size > length ? size - length : 0);
}

int ftruncate(int fd, off_t length) {
  note_truncate(fd, length);
  return REAL(ftruncate)(fd, length);
}

int ftruncate64(int fd, off64_t length) {
  note_truncate(fd, length);
  return REAL(ftruncate64)(fd, length);
}

static int synced(int fd, int (*sync)(int)) {
  struct stat status;
  int noted = fd >= 0 && fd < MAX_FDS && tracked[fd] && !fstat(fd, &status);
  uint64_t began = now();
  int failed = sync(fd);
  if (noted && !failed && access(lies_path, F_OK)) {
    note((struct entry){SYNC, status.st_ino, 0, 0, 0, 0, began}, NULL, NULL);
  }
  return failed;
}

int fsync(int fd) { return synced(fd, REAL(fsync)); }
int fdatasync(int fd) { return synced(fd, REAL(fdatasync)); }

int renameat(int from_at, const char *from, int to_at, const char *to) {
  char first[PATH_MAX], second[PATH_MAX];
  if (absolute(from_at, from, first) && absolute(to_at, to, second)) {
    note_names(RENAME, first, second, second);
  }
  return REAL(renameat)(from_at, from, to_at, to);
}

int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }

int unlinkat(int at, const char *name, int flags) {
  char path[PATH_MAX];
  if (!(flags & AT_REMOVEDIR) && absolute(at, name, path) && !access(path, F_OK)) {
    note_names(UNLINK, path, "", path);
  }
  return REAL(unlinkat)(at, name, flags);
}

int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }

int linkat(int from_at, const char *from, int to_at, const char *to, int flags) {
  char path[PATH_MAX];
  int below = absolute(to_at, to, path), failed = REAL(linkat)(from_at, from, to_at, to, flags);
  if (below && !failed) note_names(CREATE, path, "", NULL);
  return failed;
}

int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }
