// ReleaseListener: hears that something limited was given back.
#ifndef NORMD_SERVER_ADMISSION_RELEASE_LISTENER_H_
#define NORMD_SERVER_ADMISSION_RELEASE_LISTENER_H_

namespace normd {

class ReleaseListener {
 public:
  // On any thread, perhaps one of gRPC's with locks held: must be quick and must not give
  // anything back itself.
  virtual void Released() = 0;

 protected:
  ~ReleaseListener() = default;
};

}  // namespace normd

#endif  // NORMD_SERVER_ADMISSION_RELEASE_LISTENER_H_
